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

// ------------------------------------------------------------------------------------------------ half precision

FERKD_INLINE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

FERKD_INLINE void narrow(float value, BFloat16& to) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

FERKD_INLINE float widen(Float16 x) {  // without branches, so that it vectorizes on processors without F16C
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);  // the exponent's bias: 112, 224 at inf
  const float subnormal = float(int32_t(magnitude)) * 5.9604644775390625e-8f;                   // a multiple of 2^-24
  return std::bit_cast<float>(sign | (magnitude < 0x400u ? std::bit_cast<uint32_t>(subnormal) : bits));
}

FERKD_INLINE uint16_t narrow_float16(float value) {  // to nearest, ties to even
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

FERKD_INLINE void narrow(float value, Float16& to) { to.bits = narrow_float16(value); }

// Rows of half types pass through a row of float32 scratch: read_run widens into it and returns the largest, write_run narrows
// e * slope - offset out of it. Own forms for AVX-512, and for float16 on AVX2: GCC does not find the conversions by itself.

template <typename T>
FERKD_INLINE float read_any(const T* from, float* to, int64_t n) {
  float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) {
    const float x = widen(from[i]);
    to[i] = x;
    m = x > m ? x : m;
  }
  return m;
}
template <typename T>
FERKD_INLINE void write_any(const float* e, T* to, int64_t n, float slope, float offset) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(e[i] * slope - offset, to[i]);
}

#if defined(__x86_64__)
FERKD_AVX2 float read_float16_avx2(const Float16* from, float* to, int64_t n) {
  __m256 m = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, x);
    m = _mm256_max_ps(x, m);  // the second operand where the first is NaN
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, m);
  float largest = *std::max_element(lanes, lanes + 8);
  for (; i < n; ++i) {
    to[i] = _cvtsh_ss(from[i].bits);
    largest = to[i] > largest ? to[i] : largest;
  }
  return largest;
}
FERKD_AVX2 void write_float16_avx2(const float* e, Float16* to, int64_t n, float slope, float offset) {
  const __m256 slopes = _mm256_set1_ps(slope), offsets = _mm256_set1_ps(offset);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_fmsub_ps(_mm256_loadu_ps(e + i), slopes, offsets);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(e[i] * slope - offset, _MM_FROUND_TO_NEAREST_INT);
}
// AVX-512: sixteen lanes at a time, the last ones masked; `first(n)` are the lanes of the n elements that are left.
FERKD_AVX512 FERKD_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1u); }

FERKD_AVX512 FERKD_INLINE __m512 widen16(const Float16* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}
FERKD_AVX512 FERKD_INLINE __m512 widen16(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
FERKD_AVX512 FERKD_INLINE void narrow16(__m512 value, Float16* to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FERKD_AVX512 FERKD_INLINE __m512i rounded_bfloat16(__m512 value) {  // as `narrow`, the result in the upper half of each lane
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
FERKD_AVX512 FERKD_INLINE void narrow16(__m512 value, BFloat16* to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bfloat16(value), 16)));
}
FERKD_AVX512 FERKD_INLINE void narrow32(__m512 low, __m512 high, Float16* to) {
  narrow16(low, to, 0xffff);
  narrow16(high, to + 16, 0xffff);
}
FERKD_AVX512 FERKD_INLINE void narrow32(__m512 low, __m512 high, BFloat16* to) {  // the upper halves by one shuffle: vpmovdw stores are slow
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pairs = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004)), _mm512_set1_epi32(0x00030001));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded_bfloat16(low), pairs, rounded_bfloat16(high)));
}
template <typename T>
FERKD_AVX512 float read_avx512(const T* from, float* to, int64_t n) {
  __m512 m0 = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), m1 = m0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 x0 = widen16(from + i, 0xffff), x1 = widen16(from + i + 16, 0xffff);
    _mm512_storeu_ps(to + i, x0);
    _mm512_storeu_ps(to + i + 16, x1);
    m0 = _mm512_max_ps(x0, m0);  // the second operand where the first is NaN
    m1 = _mm512_max_ps(x1, m1);
  }
  for (; i < n; i += 16) {
    const __m512 x = widen16(from + i, first(n - i));
    _mm512_mask_storeu_ps(to + i, first(n - i), x);
    m0 = _mm512_mask_max_ps(m0, first(n - i), x, m0);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(m0, m1));
}
template <typename T>
FERKD_AVX512 void write_avx512(const float* e, T* to, int64_t n, float slope, float offset) {
  const __m512 slopes = _mm512_set1_ps(slope), offsets = _mm512_set1_ps(offset);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    narrow32(_mm512_fmsub_ps(_mm512_loadu_ps(e + i), slopes, offsets), _mm512_fmsub_ps(_mm512_loadu_ps(e + i + 16), slopes, offsets), to + i);
  }
  for (; i < n; i += 16) narrow16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(first(n - i), e + i), slopes, offsets), to + i, first(n - i));
}
#endif

template <Isa isa, typename T>
FERKD_INLINE float read_run(const T* from, float* to, int64_t n) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512) return read_avx512(from, to, n);
  if constexpr (std::is_same_v<T, Float16> && isa == Isa::AVX2) return read_float16_avx2(from, to, n);
#endif
  return read_any(from, to, n);
}
template <Isa isa, typename T>
FERKD_INLINE void write_run(const float* e, T* to, int64_t n, float slope, float offset) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512) return write_avx512(e, to, n, slope, offset);
  if constexpr (std::is_same_v<T, Float16> && isa == Isa::AVX2) return write_float16_avx2(e, to, n, slope, offset);
#endif
  write_any(e, to, n, slope, offset);
}

// ------------------------------------------------------------------------------------------------ exp

// exp(d) = 2^t for d <= 0, t = d / ln 2, within |d| 1.2e-7 + 1e-7 relative; 0 below 2^-126; NaN stays NaN.
// t = n + r with |r| <= 1/2; 2^r = 1 + r q(r), q the minimax polynomial of relative error 3e-9.
FERKD_INLINE float exp2_of(float t) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = t + shift;
  const float r = t - (shifted - shift);
  float q = 0.0001559467802f;
  q = q * r + 0.001340664393f;
  q = q * r + 0.009617692974f;
  q = q * r + 0.05550310551f;
  q = q * r + 0.2402265278f;
  q = q * r + 0.693147215f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2^n
  const float e = (1.0f + r * q) * power;
  return t < -126.0f ? 0.0f : e;
}
FERKD_INLINE double exp2_of(double t) { return std::exp2(t); }

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
  for (int l = 0; l < label.count; ++l) total += label.ids[l] == label.ids[j] ? label.deltas[l] : 0.0;
  return total;
}

template <typename A>
FERKD_INLINE A largest_any(const A* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; ++c) m = x[c] > m ? x[c] : m;
  return m;
}
#if defined(__x86_64__)
FERKD_AVX512 float largest_avx512(const float* x, int64_t n) {
  __m512 m[4];  // four chains at once: one alone would wait for its own last maximum
  for (__m512& lanes : m) lanes = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  int64_t c = 0;
  for (; c + 64 <= n; c += 64) {
    for (int i = 0; i < 4; ++i) m[i] = _mm512_max_ps(_mm512_loadu_ps(x + c + 16 * i), m[i]);
  }
  for (; c < n; c += 16) m[0] = _mm512_mask_max_ps(m[0], first(n - c), _mm512_maskz_loadu_ps(first(n - c), x + c), m[0]);
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])));
}
#endif
template <Isa isa, typename A>
FERKD_INLINE A largest_of(const A* x, int64_t n) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512 && std::is_same_v<A, float>) return largest_avx512(x, n);
#endif
  return largest_any(x, n);
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
  double largest = 0;  // how many d are 0
  double d = 0;       // sum of x - max x, which is T d
};

// e[c] = exp d[c] for one block, and its sums; `slope` is 1 / (T ln 2). `e` may be `x`.
template <bool keep, typename A>
FERKD_INLINE void exponentials_any(const A* x, A* e, int64_t n, A largest, A slope, Sums& sums) {
  constexpr int64_t RUN = 256;  // with 4 or 8 lanes a longer float32 sum of like terms drifts beyond what 32 lanes lose in a block
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = std::min(n, begin + RUN);
    A rest = 0, at_largest = 0, sum_d = 0;
#pragma omp simd reduction(+ : rest, at_largest, sum_d)
    for (int64_t c = begin; c < end; ++c) {
      const A d = x[c] - largest;
      const A value = exp2_of(d * slope);
      if constexpr (keep) e[c] = value;
      rest += d == A(0) ? A(0) : value;  // so written that NaN reaches the sum
      at_largest += d == A(0) ? A(1) : A(0);
      sum_d += d;
    }
    sums.rest += double(rest);
    sums.largest += double(at_largest);
    sums.d += double(sum_d);
  }
}

#if defined(__x86_64__)
// The same with two instructions that GCC does not find: vreduce, which gives r = t - floor t, and vscalef, which multiplies by
// 2^floor t and knows 0, inf and NaN. 2^r = 1 + r q(r) on [0, 1], relative error 8e-8. Two vectors a turn hide the latency.
template <bool keep>
FERKD_AVX512 void exponentials_avx512(const float* x, float* e, int64_t n, float largest, float slope, Sums& sums) {
  const __m512 m = _mm512_set1_ps(largest), by = _mm512_set1_ps(slope), zero = _mm512_setzero_ps();
  __m512 rest[2] = {zero, zero}, sum_d[2] = {zero, zero};
  int64_t at_largest = 0;
  const auto step = [&](int64_t c, __mmask16 mask, int which) FERKD_AVX512 {
    const __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + c), m);
    const __m512 t = _mm512_mul_ps(d, by);
    const __m512 r = _mm512_reduce_ps(t, 0x09);  // to no binary places, floor, no exceptions
    __m512 q = _mm512_set1_ps(0.001867129979f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.009017030528f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.05579991295f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.2401644502f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.6931513118f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f));
    const __m512 value = _mm512_scalef_ps(q, t);
    if constexpr (keep) _mm512_mask_storeu_ps(e + c, mask, value);
    const __mmask16 below = _mm512_mask_cmp_ps_mask(mask, d, zero, _CMP_NEQ_UQ);  // NaN counts as below: it must reach the sum
    rest[which] = _mm512_mask_add_ps(rest[which], below, rest[which], value);
    sum_d[which] = _mm512_add_ps(sum_d[which], d);
    at_largest += __builtin_popcount(mask & ~unsigned(below));
  };
  int64_t c = 0;
  for (; c + 32 <= n; c += 32) {
    step(c, 0xffff, 0);
    step(c + 16, 0xffff, 1);
  }
  for (; c < n; c += 16) step(c, first(n - c), 0);
  sums.rest += double(_mm512_reduce_add_ps(_mm512_add_ps(rest[0], rest[1])));
  sums.d += double(_mm512_reduce_add_ps(_mm512_add_ps(sum_d[0], sum_d[1])));
  sums.largest += double(at_largest);
}
#endif

template <Isa isa, bool keep, typename A>
FERKD_INLINE void exponentials(const A* x, A* e, int64_t n, A largest, A slope, Sums& sums) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512 && std::is_same_v<A, float>) return exponentials_avx512<keep>(x, e, n, largest, slope, sums);
#endif
  exponentials_any<keep>(x, e, n, largest, slope, sums);
}

// Rows [begin, end): T is the logits' type, A the type computed in.
template <typename T, typename A, Isa isa>
FERKD_INLINE void loss_rows(const LossJob& job, int64_t begin, int64_t end) {
  constexpr bool narrow_type = !std::is_same_v<T, A>;  // half types are widened into a row of scratch
  const int64_t C = job.classes;
  const A exponent = A(1.4426950408889634 / job.temperature);  // 1 / (T ln 2)
  std::vector<A> scratch(narrow_type ? C : 0);
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
    if constexpr (narrow_type) {
      largest = -std::numeric_limits<A>::infinity();
      for (int64_t c = 0; c < C; c += BLOCK) {
        const int64_t n = std::min(BLOCK, C - c);
        largest = std::max(largest, read_run<isa>(x + c, scratch.data() + c, n));
      }
      wide = scratch.data();
    } else {
      wide = x;
      largest = largest_of<isa>(wide, C);
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
    if constexpr (narrow_type) {
      e = scratch.data();
    } else {
      e = grad;
    }
    for (int64_t c = 0; c < C; c += BLOCK) {
      const int64_t n = std::min(BLOCK, C - c);
      if (keep) {
        exponentials<isa, true>(wide + c, e + c, n, largest, exponent, sums);
      } else {
        exponentials<isa, false>(wide + c, static_cast<A*>(nullptr), n, largest, exponent, sums);
      }
    }
    const double log_sum = std::log1p(sums.rest + (sums.largest - 1.0));
    if (job.correct != nullptr) {
      static_cast<A*>(job.logsumexp)[b] = A(double(largest) / job.temperature + log_sum);
      job.correct[b] = correct && !std::isnan(log_sum);
    }
    if (discarded) continue;

    double loss = label.mass * log_sum;
    if (label.base != 0.0) loss -= label.base * (sums.d / job.temperature);
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
    if constexpr (narrow_type) {
      write_run<isa>(e, grad, C, slope, offset);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) grad[c] = grad[c] * slope - offset;
    }
    for (int j = 0; j < label.count; ++j) {
      if constexpr (narrow_type) {
        narrow(A(at_ids[j]), grad[label.ids[j]]);
      } else {
        grad[label.ids[j]] = A(at_ids[j]);
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
        read_run<isa>(grad + c, wide, n);
        write_run<isa>(wide, grad + c, n, factor, A(0));
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

}  // namespace

template <typename A, typename P>
void adapt_row(const LabelJob& job, const AdaptedLabels& out, int64_t b) {
  Label label{0, 0, 0, DISCARDED};
  out.fault[b] = fault_of(job, b);
  if (out.fault[b] == Fault::NONE) {
    int32_t* ids = out.ids + b * job.k;
    double* deltas = out.deltas + b * job.k;
    each_pair(job, b, [&](int j, int64_t id, auto p) {
      ids[j] = int32_t(id);
      deltas[j] = double(p);
    });
    label = adapt_label<A, P>(Alone(), ids, deltas, job.k, job.target[b], job.classes, job.policy, job.exponent, job.renorm, ids, deltas);
  }
  out.mass[b] = label.mass;
  out.base[b] = label.base;
  out.count[b] = label.count;
  out.region[b] = label.region;
}

template <typename A>
void adapt_rows(const LabelJob& job, const AdaptedLabels& out, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    if (job.probs_are_double) {
      adapt_row<A, double>(job, out, b);
    } else {
      adapt_row<A, float>(job, out, b);
    }
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
