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
#else
#define FERKD_HD inline
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
  bool by_target;  // confidence `target`; otherwise `max`
};

struct Label {
  double mass;   // S; 0 when discarded
  double base;   // beta
  int count;     // K: ids and increments written
  Region region;
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

FERKD_HD uint32_t bit_field(const uint32_t* words, int at, int bits) {
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

FERKD_HD void unpack_half(const uint32_t* words, int k, int64_t classes, int64_t* ids, float* probs) {
  for (int j = 0; j < k; ++j) {
    if (classes <= HALF_ID16_CLASSES) {
      ids[j] = words[j] & 0xffffu;
      probs[j] = half_to_float(uint16_t(words[j] >> 16));
    } else {
      ids[j] = words[j];
      probs[j] = half_to_float(uint16_t(words[k + j / 2] >> (16 * (j % 2))));
    }
  }
}

// Bits from the lowest: k ids, then r_1 in 14 bits and r_2..r_k in 8; r_j = p_j / (1 - sum of the earlier p). Code 0 is r = 0, the
// others are uniform in logit r, from -ln C to 12 (r_1) or 6. In float32, as records.unpack_labels decodes it but for exp's last bits.
FERKD_HD void unpack_packed(const uint32_t* words, int k, int64_t classes, int64_t* ids, float* probs) {
  const int bits = id_bits(classes);
  const double lowest = -log(double(classes));
  int at = 0;
  for (int j = 0; j < k; ++j, at += bits) ids[j] = bit_field(words, at, bits);
  float left = 1.0f;
  for (int j = 0; j < k; ++j) {
    const int width = j == 0 ? 14 : 8;
    const double step = ((j == 0 ? 12.0 : 6.0) - lowest) / ((1 << width) - 2);
    const uint32_t code = bit_field(words, at, width);
    at += width;
    if (code == 0) {
      probs[j] = 0.0f;
      continue;
    }
    const float logit = float(lowest) + float(int(code) - 1) * float(step);
    const float e = expf(-logit);
    const float r = 1.0f / (1.0f + e);
    probs[j] = left * r;
    left = left * (e * r);  // 1 - r, with its digits when r is close to 1
  }
}

// The region of a label, from the stored probabilities: before tail mode and tempering. Sums run in stored order and in the
// probabilities' own precision, so that every backend places the same probabilities in the same region to the last bit.
template <typename P>
FERKD_HD Region region_of(const int64_t* ids, const P* probs, int k, int64_t target, int64_t classes, const Policy& policy) {
  P confidence;
  if (policy.by_target) {
    P sum = 0, on_target = 0;
    bool found = false;
    for (int j = 0; j < k; ++j) {
      sum += probs[j];
      if (ids[j] == target) {
        on_target += probs[j];
        found = true;
      }
    }
    const P left = P(1) - sum;
    confidence = found ? on_target : (left > P(0) ? left : P(0)) / P(classes - k > 1 ? classes - k : 1);
  } else {
    confidence = probs[0];
    for (int j = 1; j < k; ++j) confidence = probs[j] > confidence ? probs[j] : confidence;
  }
  if (confidence < P(policy.discard_below) || confidence > P(policy.discard_above)) return DISCARDED;  // first: discarding wins
  return confidence < P(policy.calibrate_below) ? CALIBRATED : KEPT;
}

// The label of one crop under a policy, at temperature T: ids and increments go to out_ids and deltas (room for k). In float64: a
// confident teacher's 1 - sum cancels, and so does its gradient against the student's softmax. Only the powers are taken in A, and
// for float64 probabilities in float64: 1e-60 to the power 1/20 is 1e-3, in float32 it would be 0.
template <typename A, typename P>
FERKD_HD Label adapt_label(const int64_t* ids, const P* probs, int k, int64_t target, int64_t classes, const Policy& policy,
                           double temperature, bool renorm, int32_t* out_ids, double* deltas) {
  const Label discarded{0, 0, 0, DISCARDED};
  const Region region = region_of(ids, probs, k, target, classes, policy);
  if (region == DISCARDED) return discarded;
  if (region == CALIBRATED) {  // the softened ground truth; not tempered
    const double beta = policy.smoothing / double(classes - 1);
    out_ids[0] = int32_t(target);
    deltas[0] = 1.0 - policy.smoothing - beta;
    return {1.0, beta, 1, CALIBRATED};
  }
  const double others = double(classes - k);
  double sum = 0;
  for (int j = 0; j < k; ++j) sum += double(probs[j]);
  double beta = 0;
  double scale = 1;
  if (renorm) {
    if (!(sum > 0)) return discarded;
    scale = 1.0 / sum;
  } else if (classes > k && sum < 1.0) {
    beta = (1.0 - sum) / others;
  }
  for (int j = 0; j < k; ++j) deltas[j] = double(probs[j]) * scale;  // v_j
  if (temperature != 1.0) {  // (v / m)^(1/T), and the tail as C - K equal classes; renormalised
    double largest = beta;
    for (int j = 0; j < k; ++j) largest = deltas[j] > largest ? deltas[j] : largest;
    if (largest > 0) {
      using Power = decltype(A() * P());
      const Power power = Power(1.0 / temperature);
      double total = 0;
      for (int j = 0; j < k; ++j) {
        deltas[j] = double(std::pow(Power(deltas[j] / largest), power));
        total += deltas[j];
      }
      beta = double(std::pow(Power(beta / largest), power));
      total += others * beta;
      for (int j = 0; j < k; ++j) deltas[j] /= total;
      beta /= total;
    }
  }
  double mass = others * beta;
  for (int j = 0; j < k; ++j) {
    mass += deltas[j];
    out_ids[j] = int32_t(ids[j]);
    deltas[j] -= beta;
  }
  return {mass, beta, k, KEPT};
}

}  // namespace ferkd
