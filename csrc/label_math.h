// What a stored label becomes before the logits are looked at: one row of it, in the words and symbols of docs/design.md.
// ferkd/reference.py says the same in PyTorch; a change to one shows where to change the other. No torch here, so that host and
// device code can share it.
//
// A label is a base beta on every class plus increments delta_j = v_j - beta at class ids i_j; repeated ids add. Its mass is
// S = sum v_j + (C - K) beta.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FERKD_HD __host__ __device__ inline
#define FERKD_ROLLED _Pragma("unroll 1")  // of a loop over the pairs: unrolled, it would cost the registers that hold logits
#else
#define FERKD_HD inline
#define FERKD_ROLLED
#endif

namespace ferkd {

constexpr int MAX_K = 64;                      // stored classes a label
constexpr int64_t HALF_ID16_CLASSES = 65536;   // up to this many classes a `half` label keeps id and float16 in one word

enum Region : int8_t { DISCARDED = 0, CALIBRATED = 1, KEPT = 2 };

enum class Codec { PAIRS, HALF, PACKED };

// What is wrong with a row's data. Found in the parallel loop, thrown after it.
enum class Fault : uint8_t { NONE, ID, PROBABILITY, TARGET, PARTNER, LAM };

struct Policy {
  double discard_below, calibrate_below, discard_above, smoothing;
  double even;     // smoothing / (C - 1)
  bool by_target;  // confidence `target`; otherwise `max`
};

struct Label {
  double mass;   // S; 0 when discarded
  double base;   // beta
  int count;     // K: ids and increments written
  Region region;
};

// Who works on a row: one thread alone, or the lanes of a warp (csrc/loss_cuda.cu), which share out the pairs and meet after each step.
struct Alone {
  template <typename F>
  FERKD_HD void each(int n, F f) const {
    FERKD_ROLLED
    for (int j = 0; j < n; ++j) f(j);
  }
  FERKD_HD bool is_first() const { return true; }
  FERKD_HD void sync() const {}
};

FERKD_HD float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // a subnormal is mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <typename Words>
FERKD_HD uint32_t bit_field(const Words* words, int at, int bits) {
  const int word = at / 32, shift = at % 32;
  uint32_t value = words[word] >> shift;
  if (shift + bits > 32) value |= words[word + 1] << (32 - shift);
  return bits == 32 ? value : value & ((uint32_t(1) << bits) - 1u);
}

FERKD_HD int id_bits(int64_t classes) {  // max(1, ceil(log2 classes))
  int bits = 1;
  while ((int64_t(1) << bits) < classes) ++bits;
  return bits;
}

FERKD_HD int64_t label_words(Codec codec, int k, int64_t classes) {  // 32-bit words of one record's label
  if (codec == Codec::HALF) return classes <= HALF_ID16_CLASSES ? k : k + (k + 1) / 2;
  return (k * id_bits(classes) + 14 + 8 * (k - 1) + 31) / 32;
}

// ------------------------------------------------------------------------------------------------ the codecs

// Pair j of a `half` label.
template <typename P>
FERKD_HD void half_pair(const uint32_t* words, int j, int k, int64_t classes, int64_t& id, P& p) {
  if (classes <= HALF_ID16_CLASSES) {
    id = words[j] & 0xffffu;
    p = half_to_float(uint16_t(words[j] >> 16));
  } else {
    id = words[j];
    p = half_to_float(uint16_t(words[k + j / 2] >> (16 * (j % 2))));
  }
}

// Bits from the lowest: k ids, then r_1 in 14 bits and r_2..r_k in 8; r_j = p_j / (1 - sum of the earlier p). Code 0 is r = 0, the
// others are uniform in logit r, from -ln C to 12 (r_1) or 6. In float32, as records.unpack_labels decodes it but for exp's last bits.
struct PackedGrid {
  int id_bits;
  float lowest, first_step, later_step;
};
inline PackedGrid packed_grid(int64_t classes) {
  const double lowest = -std::log(double(classes));
  return {id_bits(classes), float(lowest), float((12.0 - lowest) / ((1 << 14) - 2)), float((6.0 - lowest) / ((1 << 8) - 2))};
}
FERKD_HD int64_t packed_id(const uint32_t* words, int j, const PackedGrid& grid) { return bit_field(words, j * grid.id_bits, grid.id_bits); }

// r_j and 1 - r_j, the latter with its digits when r_j is close to 1.
struct PackedShare {
  float r, rest;
};
FERKD_HD PackedShare packed_share(const uint32_t* words, int j, int k, const PackedGrid& grid) {
  const int begin = k * grid.id_bits;
  const uint32_t code = j == 0 ? bit_field(words, begin, 14) : bit_field(words, begin + 14 + 8 * (j - 1), 8);
  if (code == 0) return {0.0f, 1.0f};
  const float by = float(int(code) - 1), step = j == 0 ? grid.first_step : grid.later_step;
#if defined(__CUDA_ARCH__)  // rounded twice, as every decoder does: fused, a p would be up to 10 last bits away
  const float logit = __fadd_rn(grid.lowest, __fmul_rn(by, step));
  const float e = float(exp(-double(logit)));
#else
  const float logit = grid.lowest + by * step;
  const float e = expf(-logit);
#endif
  const float r = 1.0f / (1.0f + e);
  return {r, e * r};
}

// ------------------------------------------------------------------------------------------------ labels as they arrive

// Exactly one of `words` (records) and `ids` with `probs` (pairs) is set.
struct LabelJob {
  Codec codec;
  const uint32_t* words;   // [B, width]
  int64_t width;
  const int64_t* ids;      // [B, k]
  const void* probs;       // [B, k] float32 or float64
  bool probs_are_double;
  int k;
  PackedGrid grid;         // of codec PACKED
  const int64_t* target;   // [B]
  const int64_t* partner;  // [B], or null without mix
  const float* lam;        // [B], or null without mix
  int64_t rows, classes;
  Policy policy;
  double temperature;
  double exponent;         // 1 / T
  bool renorm;
};

// Calls f(j, id, p) for each pair of row b in stored order; p is float, or double for float64 probabilities.
template <typename F>
FERKD_HD void each_pair(const LabelJob& job, int64_t b, F f) {
  const int k = job.k;
  if (job.codec == Codec::PAIRS) {
    FERKD_ROLLED
    for (int j = 0; j < k; ++j) {
      const int64_t at = b * k + j;
      if (job.probs_are_double) {
        f(j, job.ids[at], static_cast<const double*>(job.probs)[at]);
      } else {
        f(j, job.ids[at], static_cast<const float*>(job.probs)[at]);
      }
    }
    return;
  }
  const uint32_t* words = job.words + b * job.width;
  float left = 1.0f;
  FERKD_ROLLED
  for (int j = 0; j < k; ++j) {
    if (job.codec == Codec::HALF) {
      int64_t id;
      float p;
      half_pair(words, j, k, job.classes, id, p);
      f(j, id, p);
    } else {
      const PackedShare share = packed_share(words, j, k, job.grid);
      f(j, packed_id(words, j, job.grid), left * share.r);
      left = left * share.rest;
    }
  }
}

template <typename P>
FERKD_HD bool is_probability(P p) {
  return p >= P(0) && p <= P(1);  // so written that NaN is not
}

// What is wrong with row b's data, or NONE.
FERKD_HD Fault fault_of(const LabelJob& job, int64_t b) {
  Fault fault = Fault::NONE;
  each_pair(job, b, [&](int, int64_t id, auto p) {
    if (fault != Fault::NONE) return;
    if (id < 0 || id >= job.classes) {
      fault = Fault::ID;
    } else if (!is_probability(p)) {
      fault = Fault::PROBABILITY;
    }
  });
  if (fault != Fault::NONE) return fault;
  if (job.target[b] < 0 || job.target[b] >= job.classes) return Fault::TARGET;
  if (job.lam != nullptr) {
    if (job.partner[b] < 0 || job.partner[b] >= job.rows) return Fault::PARTNER;
    if (!is_probability(job.lam[b])) return Fault::LAM;
  }
  return Fault::NONE;
}

// ------------------------------------------------------------------------------------------------ region, mass, label

// What a label's region and mass follow from, pair by pair in stored order. The sums in P run in the probabilities' own precision, so
// that every backend places the same probabilities in the same region to the last bit. (Those of a `packed` label may differ in it, by exp.)
template <typename P>
struct Summary {
  P sum = 0, on_target = 0, largest = 0;
  double exact = 0;  // the sum in float64: a confident teacher's 1 - sum cancels
  bool found = false, any = false;

  FERKD_HD void add(int64_t id, P p, int64_t target) {
    sum += p;
    exact += double(p);
    if (id == target) {
      on_target += p;
      found = true;
    }
    largest = !any || p > largest ? p : largest;
    any = true;
  }
};

// The region of a label, from the stored probabilities: before tail mode and tempering.
template <typename P>
FERKD_HD Region region_of(const Summary<P>& label, int k, int64_t classes, const Policy& policy) {
  P confidence = label.largest;
  if (policy.by_target) {
    const P left = P(1) - label.sum;
    confidence = label.found ? label.on_target : (left > P(0) ? left : P(0)) / P(classes - k > 1 ? classes - k : 1);
  }
  if (confidence < P(policy.discard_below) || confidence > P(policy.discard_above)) return DISCARDED;  // first: discarding wins
  return confidence < P(policy.calibrate_below) ? CALIBRATED : KEPT;
}

// S of a label: what adapt_label's increments and base sum to. Tempering renormalises to 1 whatever is not nothing.
template <typename P>
FERKD_HD double mass_of(const Summary<P>& label, int k, int64_t classes, const Policy& policy, double exponent, bool renorm) {
  const Region region = region_of(label, k, classes, policy);
  if (region != KEPT) return region == CALIBRATED ? 1.0 : 0.0;
  if (renorm) return label.exact > 0 ? 1.0 : 0.0;
  const double mass = classes > k && label.exact < 1.0 ? 1.0 : label.exact;
  return exponent != 1.0 && mass > 0 ? 1.0 : mass;
}

// The label of one crop under a policy, at temperature T, exponent = 1 / T: ids and increments go to out_ids and deltas (room for k;
// they may be ids and probs themselves). In float64: a confident teacher's 1 - sum cancels, and so does its gradient against the student's softmax. P is the
// probabilities' own precision, Stored what they lie in. Only the powers are taken in A, and for float64 probabilities in float64:
// 1e-60 to the power 1/20 is 1e-3, in float32 it would be 0.
template <typename A, typename P, typename Team, typename Id, typename Stored>
FERKD_HD Label adapt_label(const Team& team, const Id* ids, const Stored* probs, int k, int64_t target, int64_t classes,
                           const Policy& policy, double exponent, bool renorm, int32_t* out_ids, double* deltas) {
  const Label discarded{0, 0, 0, DISCARDED};
  Summary<P> label;
  FERKD_ROLLED
  for (int j = 0; j < k; ++j) label.add(int64_t(ids[j]), P(probs[j]), target);
  team.sync();
  const Region region = region_of(label, k, classes, policy);
  if (region == DISCARDED) return discarded;
  if (region == CALIBRATED) {  // the softened ground truth; not tempered
    if (team.is_first()) {
      out_ids[0] = int32_t(target);
      deltas[0] = 1.0 - policy.smoothing - policy.even;
    }
    team.sync();
    return {1.0, policy.even, 1, CALIBRATED};
  }
  const double others = double(classes - k);
  double beta = 0;
  double scale = 1;
  if (renorm) {
    if (!(label.exact > 0)) return discarded;
    scale = 1.0 / label.exact;
  } else if (classes > k && label.exact < 1.0) {
    beta = (1.0 - label.exact) / others;
  }
  team.each(k, [&](int j) {
    out_ids[j] = int32_t(ids[j]);
    deltas[j] = double(P(probs[j])) * scale;  // v_j
  });
  if (exponent != 1.0) {  // (v / m)^(1/T), and the tail as C - K equal classes; renormalised
    double largest = double(label.largest) * scale;
    largest = beta > largest ? beta : largest;
    if (largest > 0) {
      using Power = decltype(A() * P());
      const Power power = Power(exponent);
      team.each(k, [&](int j) { deltas[j] = double(std::pow(Power(deltas[j] / largest), power)); });
      beta = double(std::pow(Power(beta / largest), power));
      double total = others * beta;
      FERKD_ROLLED
      for (int j = 0; j < k; ++j) total += deltas[j];
      team.sync();
      team.each(k, [&](int j) { deltas[j] /= total; });
      beta /= total;
    }
  }
  double mass = others * beta;
  FERKD_ROLLED
  for (int j = 0; j < k; ++j) mass += deltas[j];
  team.sync();
  team.each(k, [&](int j) { deltas[j] -= beta; });
  return {mass, beta, k, KEPT};
}

}  // namespace ferkd
