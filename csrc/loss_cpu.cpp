// The loss and its gradient on a CPU: one pass over a row's logits and one over its gradient, the row staying in cache between.
//
//     loss = S log(sum exp d) - beta sum d - sum_j delta_j d[i_j],      z = x / T,  d = z - max z
//     d loss / d x[c] = (S softmax(z)[c] - beta - sum_j delta_j [c = i_j]) / T
//
// One always-inline body, compiled once for each instruction set by a wrapper with a target attribute. Sums over classes are
// float32 inside blocks of at most 4,096 and float64 between them.

#include "loss_cpu.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define FERKD_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FERKD_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif
#define FERKD_INLINE inline __attribute__((always_inline))

namespace ferkd::cpu {
namespace {

constexpr int64_t BLOCK = 4096;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
enum class Isa { PLAIN, AVX2, AVX512 };

// ------------------------------------------------------------------------------------------------ half precision, a run at a time

FERKD_INLINE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

FERKD_INLINE uint16_t narrow_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

inline float widen(Float16 x) { return half_to_float(x.bits); }

inline uint16_t narrow_float16(float value) {  // to nearest, ties to even, for processors without F16C
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65,520 and above round to infinity
  if (magnitude < 0x38800000u) {                                  // below 2^-14: the result is a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;  // 0.5 has an ulp of 2^-24: the addition rounds for us
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

template <Isa isa>
FERKD_INLINE void widen_bfloat16(const BFloat16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <Isa isa>
FERKD_INLINE void narrow_bfloat16(const float* from, BFloat16* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i].bits = narrow_bfloat16(from[i]);
}

void widen_float16_plain(const Float16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
void narrow_float16_plain(const float* from, Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].bits = narrow_float16(from[i]);
}
#if defined(__x86_64__)
FERKD_AVX2 void widen_float16_avx2(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}
FERKD_AVX2 void narrow_float16_avx2(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
FERKD_AVX512 void widen_float16_avx512(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}
FERKD_AVX512 void narrow_float16_avx512(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

template <Isa isa>
FERKD_INLINE void widen_run(const BFloat16* from, float* to, int64_t n) {
  widen_bfloat16<isa>(from, to, n);
}
template <Isa isa>
FERKD_INLINE void narrow_run(const float* from, BFloat16* to, int64_t n) {
  narrow_bfloat16<isa>(from, to, n);
}
template <Isa isa>
FERKD_INLINE void widen_run(const Float16* from, float* to, int64_t n) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512) return widen_float16_avx512(from, to, n);
  if constexpr (isa == Isa::AVX2) return widen_float16_avx2(from, to, n);
#endif
  widen_float16_plain(from, to, n);
}
template <Isa isa>
FERKD_INLINE void narrow_run(const float* from, Float16* to, int64_t n) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512) return narrow_float16_avx512(from, to, n);
  if constexpr (isa == Isa::AVX2) return narrow_float16_avx2(from, to, n);
#endif
  narrow_float16_plain(from, to, n);
}

// ------------------------------------------------------------------------------------------------ exp

// exp(d) for d <= 0 within 1 ulp, 0 below -87.3 (where float32 ends); NaN stays NaN.
// d = n ln 2 + r with |r| <= ln 2 / 2, exp r = 1 + r + r^2 q(r), q the minimax polynomial of relative error 3e-9.
FERKD_INLINE float exp_of(float d) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = d * 1.44269504f + shift;
  const float n = shifted - shift;
  float r = d - n * 0.693359375f;  // ln 2 in two parts; the first has few bits, so that n times it is exact
  r = r - n * -2.12194440e-4f;
  float q = 0.001381461326f;
  q = q * r + 0.008368709824f;
  q = q * r + 0.04166838736f;
  q = q * r + 0.1666652069f;
  q = q * r + 0.4999999345f;
  const float mantissa = 1.0f + (r + (r * r) * q);
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2^n
  const float e = mantissa * power;
  return d < -87.3f ? 0.0f : e;
}
FERKD_INLINE double exp_of(double d) { return std::exp(d); }

// ------------------------------------------------------------------------------------------------ one row

// The label of row b after mixing: S = sum w S, beta = sum w beta, pairs (i, w delta).
struct MixedLabel {
  double mass = 0, base = 0;
  int count = 0;
  int32_t ids[2 * MAX_K];
  double deltas[2 * MAX_K];
};

FERKD_INLINE void mixed_label(const LossJob& job, int64_t b, MixedLabel& label) {
  const AdaptedLabels& adapted = *job.adapted;
  const int k = job.labels->k;
  Share shares[2];
  const int parts = shares_of(*job.labels, b, shares);
  label.mass = label.base = 0;
  label.count = 0;
  for (int s = 0; s < parts; ++s) {
    const auto [row, weight] = shares[s];
    label.mass += weight * adapted.mass[row];
    label.base += weight * adapted.base[row];
    for (int j = 0; j < adapted.count[row]; ++j) {
      const double delta = weight * adapted.deltas[row * k + j];
      if (delta == 0) continue;  // a zero-weight term is skipped, never multiplied: the logit may be inf
      label.ids[label.count] = adapted.ids[row * k + j];
      label.deltas[label.count++] = delta;
    }
  }
}

// The increments of all pairs that share the id of pair j.
FERKD_INLINE double total_of(const MixedLabel& label, int j) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int l = 0; l < label.count; ++l) total += label.ids[l] == label.ids[j] ? label.deltas[l] : 0.0;
  return total;
}

template <typename A>
FERKD_INLINE A largest_of(const A* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; ++c) m = x[c] > m ? x[c] : m;
  return m;
}

template <typename A>
FERKD_INLINE bool contains(const A* x, int64_t n, A value) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t c = 0; c < n; ++c) found |= x[c] == value;
  return found != 0;
}

// The sums over classes. The largest logits are counted apart: a confident row's exp d are one 1 and many tiny numbers, and added
// to the 1 in float32 they would vanish.
struct Sums {
  double rest = 0;    // sum of exp d where d < 0
  double largest = 0; // how many d are 0
  double d = 0;       // sum of d
};

// e[c] = exp d[c] for one block, and its sums. `e` may be `x`.
template <bool keep, typename A>
FERKD_INLINE void exponentials(const A* x, A* e, int64_t n, A largest, A inverse_temperature, Sums& sums) {
  A rest = 0, at_largest = 0, sum_d = 0;
#pragma omp simd reduction(+ : rest, at_largest, sum_d)
  for (int64_t c = 0; c < n; ++c) {
    const A d = (x[c] - largest) * inverse_temperature;
    const A value = exp_of(d);
    if constexpr (keep) e[c] = value;
    rest += d == A(0) ? A(0) : value;  // so written that NaN reaches the sum
    at_largest += d == A(0) ? A(1) : A(0);
    sum_d += d;
  }
  sums.rest += double(rest);
  sums.largest += double(at_largest);
  sums.d += double(sum_d);
}

// Rows [begin, end): T is the logits' type, A the type computed in.
template <typename T, typename A, Isa isa>
FERKD_INLINE void loss_rows(const LossJob& job, int64_t begin, int64_t end) {
  constexpr bool narrow = !std::is_same_v<T, A>;  // half types are widened into a row of scratch
  const int64_t C = job.classes;
  const A inverse_temperature = A(1.0 / job.temperature);
  std::vector<A> scratch(narrow ? C : 0);
  MixedLabel label;
  double at_ids[2 * MAX_K];  // d, later the gradient, at the pairs' ids

  for (int64_t b = begin; b < end; ++b) {
    const T* x = static_cast<const T*>(job.logits) + b * job.row_stride;
    T* grad = job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + b * C;
    mixed_label(job, b, label);
    const bool discarded = label.mass == 0.0;
    if (discarded) {  // constants, never 0 times something: the logits may be inf
      job.row_loss[b] = 0.0;
      if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, size_t(C) * sizeof(T));
      if (job.correct == nullptr) continue;
    }

    // Pass 1: the largest logit. Half types are widened on the way.
    const A* wide;
    A largest;
    if constexpr (narrow) {
      largest = -std::numeric_limits<A>::infinity();
      for (int64_t c = 0; c < C; c += BLOCK) {
        const int64_t n = std::min(BLOCK, C - c);
        widen_run<isa>(x + c, scratch.data() + c, n);
        largest = std::max(largest, largest_of(scratch.data() + c, n));
      }
      wide = scratch.data();
    } else {
      wide = x;
      largest = largest_of(wide, C);
    }
    for (int j = 0; j < label.count; ++j) at_ids[j] = (double(wide[label.ids[j]]) - double(largest)) / job.temperature;
    bool correct = false;
    if (job.correct != nullptr) {  // lowest id wins a tie
      const int64_t target = job.labels->target[b];
      correct = wide[target] == largest && !contains(wide, target, largest);
    }

    // Pass 2: the sums, leaving exp d where the gradient will be (half types: in the scratch).
    Sums sums;
    const bool keep = grad != nullptr && !discarded;
    A* e;
    if constexpr (narrow) {
      e = scratch.data();
    } else {
      e = grad;
    }
    for (int64_t c = 0; c < C; c += BLOCK) {
      const int64_t n = std::min(BLOCK, C - c);
      if (keep) {
        exponentials<true>(wide + c, e + c, n, largest, inverse_temperature, sums);
      } else {
        exponentials<false>(wide + c, static_cast<A*>(nullptr), n, largest, inverse_temperature, sums);
      }
    }
    const double log_sum = std::log1p(sums.rest + (sums.largest - 1.0));
    if (job.correct != nullptr) {
      static_cast<A*>(job.logsumexp)[b] = A(double(largest) / job.temperature + log_sum);
      job.correct[b] = correct && !std::isnan(log_sum);
    }
    if (discarded) continue;

    double loss = label.mass * log_sum;
    if (label.base != 0.0) loss -= label.base * sums.d;
    for (int j = 0; j < label.count; ++j) loss -= label.deltas[j] * at_ids[j];
    job.row_loss[b] = loss * job.loss_scale;
    if (grad == nullptr) continue;

    // Pass 3: the gradient of the base, then the pairs' places, each written once with the total of all pairs that share its id:
    // formed in float64, since on a confident row it is a small difference, and rounded to T only once.
    const double softmax = label.mass / (sums.rest + sums.largest);
    for (int j = 0; j < label.count; ++j) {
      at_ids[j] = (double(e[label.ids[j]]) * softmax - label.base - total_of(label, j)) * job.grad_scale;
    }
    const A slope = A(softmax * job.grad_scale), offset = A(label.base * job.grad_scale);
    for (int64_t c = 0; c < C; c += BLOCK) {
      const int64_t n = std::min(BLOCK, C - c);
      A* block = e + c;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) block[i] = block[i] * slope - offset;
      if constexpr (narrow) narrow_run<isa>(block, grad + c, n);
    }
    for (int j = 0; j < label.count; ++j) {
      const A value = A(at_ids[j]);
      if constexpr (narrow) {
        narrow_run<Isa::PLAIN>(&value, grad + label.ids[j], 1);
      } else {
        grad[label.ids[j]] = value;
      }
    }
  }
}

template <typename T, typename A, Isa isa>
FERKD_INLINE void scale_rows(const ScaleJob& job, int64_t begin, int64_t end) {
  const int64_t C = job.classes;
  for (int64_t b = begin; b < end; ++b) {
    const A factor = static_cast<const A*>(job.upstream)[job.one_per_row ? b : 0];
    if (factor == A(1)) continue;
    T* grad = static_cast<T*>(job.grad) + b * C;
    if constexpr (std::is_same_v<T, A>) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) grad[c] *= factor;
    } else {
      constexpr int64_t RUN = 512;
      A wide[RUN];
      for (int64_t c = 0; c < C; c += RUN) {
        const int64_t n = std::min(RUN, C - c);
        widen_run<isa>(grad + c, wide, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) wide[i] *= factor;
        narrow_run<isa>(wide, grad + c, n);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ the table

template <typename T, typename A>
void loss_rows_plain(const LossJob& job, int64_t begin, int64_t end) {
  loss_rows<T, A, Isa::PLAIN>(job, begin, end);
}
template <typename T, typename A>
void scale_rows_plain(const ScaleJob& job, int64_t begin, int64_t end) {
  scale_rows<T, A, Isa::PLAIN>(job, begin, end);
}
#if defined(__x86_64__)
template <typename T, typename A>
FERKD_AVX2 void loss_rows_avx2(const LossJob& job, int64_t begin, int64_t end) {
  loss_rows<T, A, Isa::AVX2>(job, begin, end);
}
template <typename T, typename A>
FERKD_AVX2 void scale_rows_avx2(const ScaleJob& job, int64_t begin, int64_t end) {
  scale_rows<T, A, Isa::AVX2>(job, begin, end);
}
template <typename T, typename A>
FERKD_AVX512 void scale_rows_avx512(const ScaleJob& job, int64_t begin, int64_t end) {
  scale_rows<T, A, Isa::AVX512>(job, begin, end);
}
template <typename T, typename A>
FERKD_AVX512 void loss_rows_avx512(const LossJob& job, int64_t begin, int64_t end) {
  loss_rows<T, A, Isa::AVX512>(job, begin, end);
}
#endif

bool can_run(const std::string& isa) {
  if (isa == "plain") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

struct Kernels {
  RowsKernel rows;
  ScaleKernel scale;
};

template <typename T, typename A>
Kernels kernels_for(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return {loss_rows_avx512<T, A>, scale_rows_avx512<T, A>};
  if (isa == "avx2") return {loss_rows_avx2<T, A>, scale_rows_avx2<T, A>};
#endif
  return {loss_rows_plain<T, A>, scale_rows_plain<T, A>};
}

Kernels kernels(Dtype dtype, const std::string& isa) {
  switch (dtype) {
    case Dtype::FLOAT32:
      return kernels_for<float, float>(isa);
    case Dtype::FLOAT64:
      return kernels_for<double, double>(isa);
    case Dtype::BFLOAT16:
      return kernels_for<BFloat16, float>(isa);
    default:
      return kernels_for<Float16, float>(isa);
  }
}

template <typename P>
Fault check_row(const LabelJob& job, int64_t b, const int64_t* ids, const P* probs) {
  for (int j = 0; j < job.k; ++j) {
    if (ids[j] < 0 || ids[j] >= job.classes) return Fault::ID;
    if (!(probs[j] >= P(0) && probs[j] <= P(1))) return Fault::PROBABILITY;  // so written that NaN is wrong too
  }
  if (job.target[b] < 0 || job.target[b] >= job.classes) return Fault::TARGET;
  if (job.lam != nullptr) {
    if (job.partner[b] < 0 || job.partner[b] >= job.rows) return Fault::PARTNER;
    if (!(job.lam[b] >= 0.0f && job.lam[b] <= 1.0f)) return Fault::LAM;
  }
  return Fault::NONE;
}

template <typename A, typename P>
void adapt_row(const LabelJob& job, const AdaptedLabels& out, int64_t b, const int64_t* ids, const P* probs) {
  out.fault[b] = check_row(job, b, ids, probs);
  Label label{0, 0, 0, DISCARDED};
  if (out.fault[b] == Fault::NONE) {
    label = adapt_label<A>(ids, probs, job.k, job.target[b], job.classes, job.policy, job.temperature, job.renorm, out.ids + b * job.k,
                           out.deltas + b * job.k);
  }
  out.mass[b] = label.mass;
  out.base[b] = label.base;
  out.count[b] = label.count;
  out.region[b] = label.region;
}

}  // namespace

template <typename A>
void adapt_rows(const LabelJob& job, const AdaptedLabels& out, int64_t begin, int64_t end) {
  int64_t ids[MAX_K];
  float probs[MAX_K];
  for (int64_t b = begin; b < end; ++b) {
    if (job.codec == Codec::PAIRS) {
      const int64_t* row_ids = job.ids + b * job.k;
      if (job.probs_are_double) {
        adapt_row<A>(job, out, b, row_ids, static_cast<const double*>(job.probs) + b * job.k);
      } else {
        adapt_row<A>(job, out, b, row_ids, static_cast<const float*>(job.probs) + b * job.k);
      }
      continue;
    }
    const uint32_t* words = job.words + b * job.width;
    if (job.codec == Codec::HALF) {
      unpack_half(words, job.k, job.classes, ids, probs);
    } else {
      unpack_packed(words, job.k, job.classes, ids, probs);
    }
    adapt_row<A>(job, out, b, ids, probs);
  }
}
template void adapt_rows<float>(const LabelJob&, const AdaptedLabels&, int64_t, int64_t);
template void adapt_rows<double>(const LabelJob&, const AdaptedLabels&, int64_t, int64_t);

RowsKernel rows_kernel(Dtype dtype, const char* isa) { return kernels(dtype, isa).rows; }
ScaleKernel scale_kernel(Dtype dtype, const char* isa) { return kernels(dtype, isa).scale; }

const char* chosen_isa() {
  if (const char* wanted = std::getenv("FERKD_CPU"); wanted != nullptr && *wanted != '\0') {
    const std::string name = wanted;
    if (name != "plain" && name != "avx2" && name != "avx512") {
      throw std::invalid_argument("FERKD_CPU: '" + name + "' is unknown; choose plain, avx2 or avx512");
    }
    if (!can_run(name)) throw std::invalid_argument("FERKD_CPU: this processor cannot run '" + name + "'; unset it or set it to plain");
    return name == "plain" ? "plain" : name == "avx2" ? "avx2" : "avx512";
  }
  static const char* const best = can_run("avx512") ? "avx512" : can_run("avx2") ? "avx2" : "plain";
  return best;
}

}  // namespace ferkd::cpu
