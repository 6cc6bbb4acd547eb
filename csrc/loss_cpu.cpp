// The loss and its gradient on a CPU: three passes over rows that stay in cache between them, so that memory sees one read of the logits
// and one write of the gradient.
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

constexpr int64_t BLOCK = 4096;              // classes whose sum may be float32
constexpr int GROUP = 16;                    // rows that go through a pass together, at most
constexpr int64_t GROUP_BYTES = 8192;        // their logits: these, their gradients and the next group's fit a first-level cache
constexpr int64_t AHEAD_BYTES = 128 * 1024;  // a longer row is not fetched before its turn: it would push out the one in work
// Exponentials of half types that AVX-512 keeps between the passes: half of a second-level cache of 1 MiB. They cost 4 C bytes a thread
// and make bfloat16 faster than float32 (C = 21,841: 0.57 ms against 0.80; computed twice, 0.88).
constexpr int64_t KEPT = 131072;

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

template <typename A>
FERKD_INLINE A widen(A x) {
  return x;
}
template <typename A>
FERKD_INLINE void narrow(A value, A& to) {
  to = value;
}

// Plain and AVX2 code widens half types into scratch and narrows them out of it: read_run widens and returns the largest, write_run
// narrows e * slope - offset. An own form for float16 on AVX2: GCC does not find the conversions by itself.

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
template <typename T, typename A>
FERKD_INLINE void write_any(const A* e, T* to, int64_t n, A slope, A offset) {
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

// AVX-512: sixteen lanes at a time, the last ones masked; `first(n)` are the lanes of the n elements that are left. Half types are
// widened and narrowed in registers.
FERKD_AVX512 FERKD_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1u); }

FERKD_AVX512 FERKD_INLINE __m512 load16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
FERKD_AVX512 FERKD_INLINE __m512 load16(const Float16* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}
FERKD_AVX512 FERKD_INLINE __m512 load16(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
// As `narrow`, the result in the upper half of each lane, but without a look for NaN: those whose low bits are all ones would not stay
// NaN. None comes here, since widened NaN have low bits of zero and slope and offset pass `plain_nan`.
FERKD_AVX512 FERKD_INLINE __m512i rounded_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
FERKD_AVX512 FERKD_INLINE void store16(__m512 value, float* to, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, value); }
FERKD_AVX512 FERKD_INLINE void store16(__m512 value, Float16* to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FERKD_AVX512 FERKD_INLINE void store16(__m512 value, BFloat16* to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bfloat16(value), 16)));
}
template <typename T>
FERKD_AVX512 FERKD_INLINE void store32(__m512 low, __m512 high, T* to) {
  store16(low, to, 0xffff);
  store16(high, to + 16, 0xffff);
}
FERKD_AVX512 FERKD_INLINE void store32(__m512 low, __m512 high, BFloat16* to) {  // the upper halves by one shuffle: vpmovdw stores are slow
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pairs = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004)), _mm512_set1_epi32(0x00030001));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded_bfloat16(low), pairs, rounded_bfloat16(high)));
}
FERKD_INLINE float plain_nan(float x) { return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x; }

template <typename T>
FERKD_AVX512 void write_avx512(const float* e, T* to, int64_t n, float slope, float offset) {
  const __m512 slopes = _mm512_set1_ps(plain_nan(slope)), offsets = _mm512_set1_ps(plain_nan(offset));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 low = _mm512_fmsub_ps(_mm512_loadu_ps(e + i), slopes, offsets);
    store32(low, _mm512_fmsub_ps(_mm512_loadu_ps(e + i + 16), slopes, offsets), to + i);
  }
  for (; i < n; i += 16) store16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(first(n - i), e + i), slopes, offsets), to + i, first(n - i));
}
#endif

template <Isa isa, typename T>
FERKD_INLINE float read_run(const T* from, float* to, int64_t n) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Float16> && isa != Isa::PLAIN) return read_float16_avx2(from, to, n);
#endif
  return read_any(from, to, n);
}
template <Isa isa, typename T, typename A>
FERKD_INLINE void write_run(const A* e, T* to, int64_t n, A slope, A offset) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512 && std::is_same_v<A, float>) return write_avx512(e, to, n, slope, offset);
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

// ------------------------------------------------------------------------------------------------ passes over a row

template <typename A>
FERKD_INLINE A largest_any(const A* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; ++c) m = x[c] > m ? x[c] : m;
  return m;
}
#if defined(__x86_64__)
template <typename T>
FERKD_AVX512 float largest_avx512(const T* x, int64_t n) {
  __m512 m[4];  // four chains at once: one alone would wait for its own last maximum
  for (__m512& lanes : m) lanes = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  int64_t c = 0;
  for (; c + 64 <= n; c += 64) {
    for (int i = 0; i < 4; ++i) m[i] = _mm512_max_ps(load16(x + c + 16 * i, 0xffff), m[i]);  // the second operand where the first is NaN
  }
  for (; c < n; c += 16) m[0] = _mm512_mask_max_ps(m[0], first(n - c), load16(x + c, first(n - c)), m[0]);
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])));
}
#endif
template <Isa isa, typename A, typename T>
FERKD_INLINE A largest_of(const T* x, int64_t n) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512 && std::is_same_v<A, float>) return largest_avx512(x, n);
  else
#endif
    return largest_any(x, n);
}

template <typename T, typename A>
FERKD_INLINE bool contains(const T* x, int64_t n, A value) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t c = 0; c < n; ++c) found |= widen(x[c]) == value;
  return found != 0;
}

// The sums over classes. The largest logits are counted apart: a confident row's exp d are one 1 and many tiny numbers, and added
// to the 1 in float32 they would vanish.
struct Sums {
  double rest = 0;     // sum of exp d where d < 0
  double largest = 0;  // how many d are 0
  double d = 0;        // sum of x - max x, which is T d
};

// What the next group of rows will read and write: fetched into the cache while this one computes.
template <typename T>
struct Ahead {
  const T* x;
  const T* grad;
};

// exp d for one block and its sums; `slope` is 1 / (T ln 2). With `keep` the exponentials go to `e`.
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
// exp2_of with two instructions that GCC does not find: vreduce, which gives r = t - floor t, and vscalef, which multiplies by
// 2^floor t and knows 0, inf and NaN. 2^r = 1 + r q(r) on [0, 1], relative error 8e-8.
FERKD_AVX512 FERKD_INLINE __m512 exp2_of(__m512 t) {
  const __m512 r = _mm512_reduce_ps(t, 0x09);  // to no binary places, floor, no exceptions
  __m512 q = _mm512_set1_ps(0.001867129979f);
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.009017030528f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.05579991295f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.2401644502f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.6931513118f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(q, t);
}

template <bool keep, typename T>
FERKD_AVX512 void exponentials_avx512(const T* x, float* e, int64_t n, float largest, float slope, Sums& sums, Ahead<T> ahead) {
  const __m512 m = _mm512_set1_ps(largest), by = _mm512_set1_ps(slope), zero = _mm512_setzero_ps();
  __m512 rest[2] = {zero, zero}, sum_d[2] = {zero, zero};
  int64_t at_largest = 0;
  const auto step = [&](int64_t c, __mmask16 mask, int which) FERKD_AVX512 {
    const __m512 d = _mm512_maskz_sub_ps(mask, load16(x + c, mask), m);
    const __m512 value = exp2_of(_mm512_mul_ps(d, by));
    if constexpr (keep) _mm512_mask_storeu_ps(e + c, mask, value);
    const __mmask16 below = _mm512_mask_cmp_ps_mask(mask, d, zero, _CMP_NEQ_UQ);  // NaN counts as below: it must reach the sum
    rest[which] = _mm512_mask_add_ps(rest[which], below, rest[which], value);
    sum_d[which] = _mm512_add_ps(sum_d[which], d);
    at_largest += __builtin_popcount(mask & ~unsigned(below));
  };
  int64_t c = 0;
  for (; c + 32 <= n; c += 32) {
    for (size_t line = 0; line < 32 * sizeof(T); line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.x + c) + line, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(ahead.grad + c) + line, _MM_HINT_T0);
    }
    step(c, 0xffff, 0);
    step(c + 16, 0xffff, 1);
  }
  for (; c < n; c += 16) step(c, first(n - c), 0);
  sums.rest += double(_mm512_reduce_add_ps(_mm512_add_ps(rest[0], rest[1])));
  sums.d += double(_mm512_reduce_add_ps(_mm512_add_ps(sum_d[0], sum_d[1])));
  sums.largest += double(at_largest);
}

// grad = exp d * slope - offset from the logits once more.
template <typename T>
FERKD_AVX512 void write_again_avx512(const T* x, T* grad, int64_t n, float largest, float exponent, float slope, float offset) {
  const __m512 m = _mm512_set1_ps(largest), by = _mm512_set1_ps(exponent);
  const __m512 slopes = _mm512_set1_ps(plain_nan(slope)), offsets = _mm512_set1_ps(plain_nan(offset));
  const auto value = [&](int64_t c, __mmask16 mask) FERKD_AVX512 {
    const __m512 e = exp2_of(_mm512_mul_ps(_mm512_sub_ps(load16(x + c, mask), m), by));
    return _mm512_fmsub_ps(e, slopes, offsets);
  };
  int64_t c = 0;
  for (; c + 32 <= n; c += 32) store32(value(c, 0xffff), value(c + 16, 0xffff), grad + c);
  for (; c < n; c += 16) store16(value(c, first(n - c)), grad + c, first(n - c));
}
#endif

template <Isa isa, bool keep, typename X, typename A, typename T>
FERKD_INLINE void exponentials(const X* x, A* e, int64_t n, A largest, A slope, Sums& sums, Ahead<T> ahead) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::AVX512 && std::is_same_v<A, float>) exponentials_avx512<keep>(x, e, n, largest, slope, sums, ahead);
  else
#endif
    exponentials_any<keep>(x, e, n, largest, slope, sums);
}

// ------------------------------------------------------------------------------------------------ one row

// Increments delta at class ids. Pairs of the same id are one; none is 0: a zero-weight term is skipped, never multiplied, since the
// logit may be inf.
struct Pairs {
  int count;
  const int32_t* ids;
  const double* deltas;
};

FERKD_INLINE int add_pair(int32_t* ids, double* deltas, int count, int32_t id, double delta) {
  int at = 0;
  while (at < count && ids[at] != id) ++at;
  if (at < count) {
    deltas[at] += delta;
    return count;
  }
  ids[count] = id;
  deltas[count] = delta;
  return delta == 0.0 ? count : count + 1;
}

// What is known of a row between the passes.
template <typename T, typename A>
struct Row {
  int64_t b;
  const T* x;
  T* grad;  // null when no gradient is wanted
  A* e;     // where exp d is kept between the passes; null where it is not
  A largest;
  double mass, base;  // S and beta of the label after mixing
  Pairs pairs;        // its increments
  Sums sums;
};

// Where pass 2 finds the logits: in the scratch after widening, which the exponentials then overwrite.
template <bool widened, typename T, typename A>
FERKD_INLINE auto logits_of(const Row<T, A>& row) {
  if constexpr (widened) {
    return static_cast<const A*>(row.e);
  } else {
    return row.x;
  }
}

// Where the pairs of a mixed row lie.
struct MixedPairs {
  int32_t ids[2 * MAX_K];
  double deltas[2 * MAX_K];
};

// The label of a row after mixing: S = sum w S, beta = sum w beta, pairs (i, w delta).
template <typename T, typename A>
FERKD_INLINE void mix_labels(const LabelJob& labels, const AdaptedLabels& adapted, Row<T, A>& row, MixedPairs& mixed) {
  const int k = labels.k;
  const int64_t b = row.b;
  if (labels.lam == nullptr) {
    row.mass = adapted.mass[b];
    row.base = adapted.base[b];
    row.pairs = {adapted.count[b], adapted.ids + b * k, adapted.deltas + b * k};
    return;
  }
  Share shares[2];
  const int parts = shares_of(labels, b, shares);
  row.mass = row.base = 0;
  int count = 0;
  for (int s = 0; s < parts; ++s) {
    const auto [from, weight] = shares[s];
    row.mass += weight * adapted.mass[from];
    row.base += weight * adapted.base[from];
    for (int j = 0; j < adapted.count[from]; ++j) {
      count = add_pair(mixed.ids, mixed.deltas, count, adapted.ids[from * k + j], weight * adapted.deltas[from * k + j]);
    }
  }
  row.pairs = {count, mixed.ids, mixed.deltas};
}

// Rows [begin, end): T is the logits' type, A the type computed in. Small rows go through each pass in groups that fit the first-level
// cache: the end of one row's pass (a reduction, a logarithm, a division) then overlaps with the next row's.
template <typename T, typename A, Isa isa>
FERKD_INLINE void loss_rows(const LossJob& job, int64_t begin, int64_t end) {
  constexpr bool narrow_type = !std::is_same_v<T, A>;
  constexpr bool widened = narrow_type && isa != Isa::AVX512;  // AVX-512 widens in registers, the others into the scratch, once
  const int64_t C = job.classes, stride = job.row_stride;
  const int64_t group = std::clamp<int64_t>(GROUP_BYTES / (C * int64_t(sizeof(T))), 1, GROUP);
  const LabelJob& labels = *job.labels;
  const T* const logits = static_cast<const T*>(job.logits);
  T* const grads = static_cast<T*>(job.grad);
  const bool stats = job.correct != nullptr;
  const double per_temperature = 1.0 / job.temperature, grad_scale = job.grad_scale, loss_scale = job.loss_scale;
  const A exponent = A(1.4426950408889634 / job.temperature);  // 1 / (T ln 2)
  // Between the passes exp d lies where the gradient will be. That of half types lies in a scratch that the cache holds; for a longer
  // row AVX-512 computes it again, and the others, which take twice as long for that, use a scratch as long as the row.
  const bool keeps = !narrow_type || widened || C <= KEPT;
  std::vector<A> scratch(narrow_type && keeps ? group * C : 0);
  Row<T, A> rows[GROUP];
  MixedPairs mixed[GROUP];

  for (int64_t first_b = begin; first_b < end; first_b += group) {
    // Pass 1: the labels, and the largest logits.
    int count = 0;
    const int64_t last_b = std::min(end, first_b + group);
    for (int64_t b = first_b; b < last_b; ++b) {
      Row<T, A>& row = rows[count];
      row.b = b;
      row.x = logits + b * stride;
      row.grad = grads == nullptr ? nullptr : grads + b * C;
      mix_labels(labels, *job.adapted, row, mixed[count]);
      if (row.mass == 0.0) {  // discarded: constants, never 0 times something, since the logits may be inf
        job.row_loss[b] = 0.0;
        if (row.grad != nullptr) std::memset(static_cast<void*>(row.grad), 0, size_t(C) * sizeof(T));
        if (!stats) continue;
        row.grad = nullptr;
      }
      if constexpr (narrow_type) {
        row.e = keeps ? scratch.data() + count * C : nullptr;
      } else {
        row.e = row.grad;
      }
      if constexpr (widened) {
        row.largest = read_run<isa>(row.x, row.e, C);
      } else {
        row.largest = largest_of<isa, A>(row.x, C);
      }
      ++count;
    }

    // Pass 2: the sums, and exp d.
    for (int r = 0; r < count; ++r) {
      Row<T, A>& row = rows[r];
      row.sums = {};
      const int64_t next = C * int64_t(sizeof(T)) <= AHEAD_BYTES && row.b + group < end ? group : 0;
      const T* const next_x = row.x + next * stride;
      const T* const next_grad = row.grad == nullptr ? row.x : row.grad + next * C;
      const auto* x = logits_of<widened>(row);
      for (int64_t c = 0; c < C; c += BLOCK) {
        const int64_t n = std::min(BLOCK, C - c);
        const Ahead<T> ahead{next_x + c, next_grad + c};
        if (keeps && row.grad != nullptr) {
          exponentials<isa, true>(x + c, row.e + c, n, row.largest, exponent, row.sums, ahead);
        } else {
          exponentials<isa, false>(x + c, static_cast<A*>(nullptr), n, row.largest, exponent, row.sums, ahead);
        }
      }
    }

    // The loss.
    for (int r = 0; r < count; ++r) {
      const Row<T, A>& row = rows[r];
      const double log_sum = std::log1p(row.sums.rest + (row.sums.largest - 1.0));
      if (stats) {
        const int64_t target = labels.target[row.b];
        const bool is_largest = widen(row.x[target]) == row.largest && !contains(row.x, target, row.largest);  // lowest id wins a tie
        job.correct[row.b] = is_largest && !std::isnan(log_sum);
        static_cast<A*>(job.logsumexp)[row.b] = A(double(row.largest) / job.temperature + log_sum);
        if (row.mass == 0.0) continue;
      }
      double loss = row.mass * log_sum;
      if (row.base != 0.0) loss -= row.base * (row.sums.d * per_temperature);
      for (int j = 0; j < row.pairs.count; ++j) {
        loss -= row.pairs.deltas[j] * ((double(widen(row.x[row.pairs.ids[j]])) - double(row.largest)) * per_temperature);
      }
      job.row_loss[row.b] = loss * loss_scale;
    }

    // Pass 3: the gradient of the base, then the pairs' places: formed in float64, since on a confident row they are small
    // differences, and rounded to T only once.
    for (int r = 0; r < count; ++r) {
      const Row<T, A>& row = rows[r];
      if (row.grad == nullptr) continue;
      const double softmax = row.mass / (row.sums.rest + row.sums.largest);  // of d = 0
      const A slope = A(softmax * grad_scale), offset = A(row.base * grad_scale);
      A at_ids[2 * MAX_K];
      for (int j = 0; j < row.pairs.count; ++j) {
        const int32_t id = row.pairs.ids[j];
        const A e = keeps ? row.e[id] : exp2_of(A(widen(row.x[id]) - row.largest) * exponent);
        at_ids[j] = A((double(e) * softmax - row.base - row.pairs.deltas[j]) * grad_scale);
      }
      if (keeps) {
        write_run<isa>(row.e, row.grad, C, slope, offset);
      } else {
#if defined(__x86_64__)
        if constexpr (narrow_type && !widened) write_again_avx512(row.x, row.grad, C, row.largest, exponent, slope, offset);
#endif
      }
      for (int j = 0; j < row.pairs.count; ++j) narrow(at_ids[j], row.grad[row.pairs.ids[j]]);
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

bool has_fault(const LabelJob& job, int64_t b, bool pairs_are_right) {
  if (!pairs_are_right || job.target[b] < 0 || job.target[b] >= job.classes) return true;
  return job.lam != nullptr && (job.partner[b] < 0 || job.partner[b] >= job.rows || !is_probability(job.lam[b]));
}

// The codec and the probabilities' type are told to the compiler, so that they are not asked for at each pair.
template <typename A, typename P, Codec codec>
void adapt_rows_of(LabelJob job, const AdaptedLabels& out, int64_t begin, int64_t end) {
  job.codec = codec;
  job.probs_are_double = std::is_same_v<P, double>;
  for (int64_t b = begin; b < end; ++b) {
    int32_t* ids = out.ids + b * job.k;
    double* deltas = out.deltas + b * job.k;
    bool pairs_are_right = true;
    each_pair(job, b, [&](int j, int64_t id, auto p) {
      pairs_are_right &= uint64_t(id) < uint64_t(job.classes) && is_probability(p);
      ids[j] = int32_t(id);
      deltas[j] = double(p);
    });
    Label label{0, 0, 0, DISCARDED};
    out.fault[b] = Fault::NONE;
    if (has_fault(job, b, pairs_are_right)) {
      out.fault[b] = fault_of(job, b);
    } else {
      label = adapt_label<A, P>(Alone(), ids, deltas, job.k, job.target[b], job.classes, job.policy, job.exponent, job.renorm, ids, deltas);
      int pairs = 0;
      for (int j = 0; j < label.count; ++j) pairs = add_pair(ids, deltas, pairs, ids[j], deltas[j]);
      label.count = pairs;
    }
    out.mass[b] = label.mass;
    out.base[b] = label.base;
    out.count[b] = label.count;
    out.region[b] = label.region;
  }
}

}  // namespace

template <typename A>
void adapt_rows(const LabelJob& job, const AdaptedLabels& out, int64_t begin, int64_t end) {
  if (job.codec == Codec::HALF) return adapt_rows_of<A, float, Codec::HALF>(job, out, begin, end);
  if (job.codec == Codec::PACKED) return adapt_rows_of<A, float, Codec::PACKED>(job, out, begin, end);
  if (job.probs_are_double) return adapt_rows_of<A, double, Codec::PAIRS>(job, out, begin, end);
  adapt_rows_of<A, float, Codec::PAIRS>(job, out, begin, end);
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
