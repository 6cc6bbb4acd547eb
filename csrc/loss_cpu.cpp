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
template <typename A>
struct MixedLabel {
  double mass = 0, base = 0;
  int count = 0;
  int32_t ids[2 * MAX_K];
  A deltas[2 * MAX_K];
};

template <typename A>
FERKD_INLINE void mixed_label(const LossJob& job, int64_t b, MixedLabel<A>& label) {
  const auto& adapted = *static_cast<const AdaptedLabels<A>*>(job.adapted);
  const int k = job.labels->k;
  Share shares[2];
  const int parts = shares_of(*job.labels, b, shares);
  label.mass = label.base = 0;
  label.count = 0;
  for (int s = 0; s < parts; ++s) {
    const auto [row, weight] = shares[s];
    label.mass += weight * double(adapted.mass[row]);
    label.base += weight * double(adapted.base[row]);
    for (int j = 0; j < adapted.count[row]; ++j) {
      const A delta = A(weight) * adapted.deltas[row * k + j];
      if (delta == A(0)) continue;  // a zero-weight term is skipped, never multiplied: the logit may be inf
      label.ids[label.count] = adapted.ids[row * k + j];
      label.deltas[label.count++] = delta;
    }
  }
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

// e[c] = exp d[c] for one block; adds to sum exp d and sum d. `e` may be `x`.
template <bool keep, typename A>
FERKD_INLINE void exponentials(const A* x, A* e, int64_t n, A largest, A inverse_temperature, double& sum_exp, double& sum_d) {
  A block_exp = 0, block_d = 0;
#pragma omp simd reduction(+ : block_exp, block_d)
  for (int64_t c = 0; c < n; ++c) {
    const A d = (x[c] - largest) * inverse_temperature;
    const A value = exp_of(d);
    if constexpr (keep) e[c] = value;
    block_exp += value;
    block_d += d;
  }
  sum_exp += double(block_exp);
  sum_d += double(block_d);
}

// Rows [begin, end): T is the logits' type, A the type computed in.
template <typename T, typename A, Isa isa>
FERKD_INLINE void loss_rows(const LossJob& job, int64_t begin, int64_t end) {
  constexpr bool narrow = !std::is_same_v<T, A>;  // half types are widened into a row of scratch
  const int64_t C = job.classes;
  const A inverse_temperature = A(1.0 / job.temperature);
  std::vector<A> scratch(narrow ? C : 0);
  MixedLabel<A> label;
  A at_ids[2 * MAX_K];

  for (int64_t b = begin; b < end; ++b) {
    const T* x = static_cast<const T*>(job.logits) + b * job.row_stride;
    T* grad = job.grad == nullptr ? nullptr : static_cast<T*>(job.grad) + b * C;
    mixed_label<A>(job, b, label);
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
    for (int j = 0; j < label.count; ++j) at_ids[j] = (wide[label.ids[j]] - largest) * inverse_temperature;
    bool correct = false;
    if (job.correct != nullptr) {  // lowest id wins a tie
      const int64_t target = job.labels->target[b];
      correct = wide[target] == largest && !contains(wide, target, largest);
    }

    // Pass 2: the sums, leaving exp d where the gradient will be (half types: in the scratch).
    double sum_exp = 0, sum_d = 0;
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
        exponentials<true>(wide + c, e + c, n, largest, inverse_temperature, sum_exp, sum_d);
      } else {
        exponentials<false>(wide + c, static_cast<A*>(nullptr), n, largest, inverse_temperature, sum_exp, sum_d);
      }
    }
    const double log_sum = std::log(sum_exp);
    if (job.correct != nullptr) {
      static_cast<A*>(job.logsumexp)[b] = A(double(largest) / job.temperature + log_sum);
      job.correct[b] = correct && !std::isnan(log_sum);
    }
    if (discarded) continue;

    double loss = label.mass * log_sum;
    if (label.base != 0.0) loss -= label.base * sum_d;
    for (int j = 0; j < label.count; ++j) loss -= double(label.deltas[j]) * double(at_ids[j]);
    job.row_loss[b] = loss * job.loss_scale;
    if (grad == nullptr) continue;

    // Pass 3: the gradient of the base, then the increments of the pairs. Repeated ids add up in A, before any rounding to T.
    const A slope = A(label.mass / sum_exp * job.grad_scale), offset = A(label.base * job.grad_scale), scale = A(job.grad_scale);
    for (int64_t c = 0; c < C; c += BLOCK) {
      const int64_t n = std::min(BLOCK, C - c);
      A* block = e + c;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) block[i] = block[i] * slope - offset;
      if constexpr (narrow) narrow_run<isa>(block, grad + c, n);
    }
    for (int j = 0; j < label.count; ++j) e[label.ids[j]] -= label.deltas[j] * scale;
    if constexpr (narrow) {
      for (int j = 0; j < label.count; ++j) narrow_run<Isa::PLAIN>(e + label.ids[j], grad + label.ids[j], 1);
    }
  }
}

// ------------------------------------------------------------------------------------------------ the table

template <typename T, typename A>
void loss_rows_plain(const LossJob& job, int64_t begin, int64_t end) {
  loss_rows<T, A, Isa::PLAIN>(job, begin, end);
}
#if defined(__x86_64__)
template <typename T, typename A>
FERKD_AVX2 void loss_rows_avx2(const LossJob& job, int64_t begin, int64_t end) {
  loss_rows<T, A, Isa::AVX2>(job, begin, end);
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

template <typename T, typename A>
RowsKernel kernel_for(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return loss_rows_avx512<T, A>;
  if (isa == "avx2") return loss_rows_avx2<T, A>;
#endif
  return loss_rows_plain<T, A>;
}

template <typename A, typename P>
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
void adapt_row(const LabelJob& job, const AdaptedLabels<A>& out, int64_t b, const int64_t* ids, const P* probs) {
  out.fault[b] = check_row<A, P>(job, b, ids, probs);
  Label<A> label{A(0), A(0), 0, DISCARDED};
  if (out.fault[b] == Fault::NONE) {
    label = adapt_label<P, A>(ids, probs, job.k, job.target[b], job.classes, job.policy, A(1.0 / job.temperature), job.renorm,
                              out.ids + b * job.k, out.deltas + b * job.k);
  }
  out.mass[b] = label.mass;
  out.base[b] = label.base;
  out.count[b] = label.count;
  out.region[b] = label.region;
}

}  // namespace

template <typename A>
void adapt_rows(const LabelJob& job, const AdaptedLabels<A>& out, int64_t begin, int64_t end) {
  int64_t ids[MAX_K];
  float probs[MAX_K];
  for (int64_t b = begin; b < end; ++b) {
    if (job.codec == Codec::PAIRS) {
      const int64_t* row_ids = job.ids + b * job.k;
      if (job.probs_are_double) {
        adapt_row<A, double>(job, out, b, row_ids, static_cast<const double*>(job.probs) + b * job.k);
      } else {
        adapt_row<A, float>(job, out, b, row_ids, static_cast<const float*>(job.probs) + b * job.k);
      }
      continue;
    }
    const uint32_t* words = job.words + b * job.width;
    if (job.codec == Codec::HALF) {
      unpack_half(words, job.k, job.classes, ids, probs);
    } else {
      unpack_packed(words, job.k, job.classes, ids, probs);
    }
    adapt_row<A, float>(job, out, b, ids, probs);
  }
}
template void adapt_rows<float>(const LabelJob&, const AdaptedLabels<float>&, int64_t, int64_t);
template void adapt_rows<double>(const LabelJob&, const AdaptedLabels<double>&, int64_t, int64_t);

RowsKernel rows_kernel(Dtype dtype, const char* isa) {
  switch (dtype) {
    case Dtype::FLOAT32:
      return kernel_for<float, float>(isa);
    case Dtype::FLOAT64:
      return kernel_for<double, double>(isa);
    case Dtype::BFLOAT16:
      return kernel_for<BFloat16, float>(isa);
    default:
      return kernel_for<Float16, float>(isa);
  }
}

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
