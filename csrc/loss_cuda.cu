// The loss and its gradient on a GPU: the logits are read once and the gradient is written once, the row waiting in registers between.
//
//     loss = S log(sum exp d) - beta sum d - sum_j delta_j d[i_j],      z = x / T,  d = z - max z
//     d loss / d x[c] = (S softmax(z)[c] - beta - sum_j delta_j [c = i_j]) / T
//
// A row belongs to a warp, to a block, or to a cluster of blocks, whichever its registers ask for. Every thread makes a Partial of its
// own logits; partials meet by one rule, lane with lane, warp with warp, block with block. One warp decodes and adapts the row's label
// while the logits are on their way (with a block a row, a warp that does nothing else), and writes what only the label knows.

#include "loss_cuda.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace ferkd::cuda {
namespace {

using simt::Vec16;

constexpr int LANES = 32;
constexpr int ROWS_A_BLOCK = 4;      // with a warp a row
// With a block a row: the most threads of a block and the vectors a thread holds, so many that nothing spills.
constexpr int SMALL_THREADS = 288, SMALL_VECTORS = 8;   // two blocks a multiprocessor: one loads while the other stores
constexpr int FULL_VECTORS = 11;                        // of small blocks for half types, where there are no clusters
constexpr int LARGE_THREADS = 512, LARGE_VECTORS = 12;  // one block a multiprocessor
constexpr int MAX_CLUSTER = 8;       // what every GPU with clusters can do

// ------------------------------------------------------------------------------------------------ elements

struct Float32 {
  using Element = float;
  static constexpr int LENGTH = 4;  // elements of a 16-byte vector
  static __device__ float get(const Vec16& v, int e) { return bit_cast<float>(v.word[e]); }
  static __device__ float get(Element x) { return x; }
  static __device__ void put(Element& to, float x) { to = x; }
  static __device__ void put(Vec16& to, int word, const float* x) { to.word[word] = bit_cast<uint32_t>(x[0]); }
  static constexpr int PER_WORD = 1;

  template <typename To, typename From>
  static __device__ To bit_cast(From from) {
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
  }
};
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int LENGTH = 8, PER_WORD = 2;
  static __device__ float get(const Vec16& v, int e) { return simt::bfloat16_to_float(uint16_t(v.word[e / 2] >> (16 * (e % 2)))); }
  static __device__ float get(Element x) { return simt::bfloat16_to_float(x); }
  static __device__ void put(Element& to, float x) { to = simt::float_to_bfloat16(x); }
  static __device__ void put(Vec16& to, int word, const float* x) { to.word[word] = simt::floats_to_bfloat16s(x[0], x[1]); }
};
struct Float16 {
  using Element = uint16_t;
  static constexpr int LENGTH = 8, PER_WORD = 2;
  static __device__ float get(const Vec16& v, int e) { return simt::float16_to_float(uint16_t(v.word[e / 2] >> (16 * (e % 2)))); }
  static __device__ float get(Element x) { return simt::float16_to_float(x); }
  static __device__ void put(Element& to, float x) { to = simt::float_to_float16(x); }
  static __device__ void put(Vec16& to, int word, const float* x) { to.word[word] = simt::floats_to_float16s(x[0], x[1]); }
};

// ------------------------------------------------------------------------------------------------ warps

template <typename T>
__device__ T sum_of_warp(T value) {
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) value += simt::shuffle_xor(value, lanes);
  return value;
}
__device__ float largest_of_warp(float value) {
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) value = fmaxf(value, simt::shuffle_xor(value, lanes));
  return value;
}

// The lanes of a warp as who works on a row's label.
struct WarpTeam {
  int lane;
  template <typename F>
  __device__ void each(int n, F f) const {
    FERKD_ROLLED
    for (int j = lane; j < n; j += LANES) f(j);
    simt::sync_warp();
  }
  __device__ bool is_first() const { return lane == 0; }
  __device__ void sync() const { simt::sync_warp(); }
};

// ------------------------------------------------------------------------------------------------ partial sums over classes

constexpr int BEFORE = 1, HIT = 2;  // a largest logit at an id below the target's; the target's own is a largest one

// The sums of some of a row's classes, relative to the largest of them. The largest logits are counted apart: a confident row's exp d
// are one 1 and many tiny numbers, and added to the 1 in float32 they would vanish.
struct Partial {
  float largest;  // the largest x, -inf for none
  float rest;     // sum of exp d where d < 0
  float sum_d;    // sum of x - largest, which is T d
  int elements;
  int at_largest;  // how many d are 0
  int flags;
};
__device__ Partial nothing() { return {-INFINITY, 0.0f, 0.0f, 0, 0, 0}; }

// What is taken from each logit: the largest, unless that is -inf, where the difference would be NaN and not -inf.
__device__ float shift_of(const Partial& p) { return p.largest == -INFINITY ? 0.0f : p.largest; }

// The same sums relative to a larger logit. `slope` is 1 / (T ln 2).
__device__ Partial relative_to(Partial p, float largest, float slope) {
  if (p.largest != largest) {  // -inf and -inf are equal: nothing has to change
    p.rest = (p.rest + float(p.at_largest)) * simt::exp2_approximate((p.largest - largest) * slope);
    p.sum_d += p.elements == 0 ? 0.0f : float(p.elements) * (p.largest - largest);
    p.at_largest = p.flags = 0;
  }
  return p;
}

__device__ Partial merged(Partial a, Partial b, float slope) {
  const float largest = fmaxf(a.largest, b.largest);
  a = relative_to(a, largest, slope);
  b = relative_to(b, largest, slope);
  return {largest, a.rest + b.rest, a.sum_d + b.sum_d, a.elements + b.elements, a.at_largest + b.at_largest, a.flags | b.flags};
}

// The partials of a warp's lanes as one, the same in every lane.
__device__ Partial merged_in_warp(Partial p, float slope) {
  const float largest = largest_of_warp(p.largest);
  p = relative_to(p, largest, slope);
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
    p.rest += simt::shuffle_xor(p.rest, lanes);
    p.sum_d += simt::shuffle_xor(p.sum_d, lanes);
    p.elements += simt::shuffle_xor(p.elements, lanes);
    p.at_largest += simt::shuffle_xor(p.at_largest, lanes);
    p.flags |= simt::shuffle_xor(p.flags, lanes);
  }
  p.largest = largest;
  return p;
}

// ------------------------------------------------------------------------------------------------ labels

// The label of a row after mixing, in shared memory: S = sum w S, beta = sum w beta, pairs (i, w delta).
struct RowLabel {
  double mass, base;
  double loss_scale, grad_scale;     // what multiplies the row's loss and its d loss / d z
  float mass_scaled, base_scaled;    // S and beta times grad_scale, for the dense part of the gradient
  int count;                         // pairs; one whose increment is 0 is left out: its logit may be inf
  Region region;                     // of the row's own label
  int32_t ids[2 * MAX_K];
  double deltas[2 * MAX_K];          // while a label is decoded, its probabilities
  float logits[2 * MAX_K];           // x[i_j]; while a packed label is decoded, its 1 - r_j
  Partial whole;                     // the row's sums over classes, once they are known
  double loss;                       // of the rows so far
};

__device__ int64_t within(int64_t value, int64_t limit, bool& astray) {
  const bool inside = value >= 0 && value < limit;
  astray |= !inside;
  return inside ? value : value < 0 ? 0 : limit - 1;
}

// S of row b's own label. Where nobody checked the data, an id or a target outside the classes makes it NaN.
template <typename P>
__device__ double own_mass(const LabelJob& job, int64_t b) {
  bool astray = false;
  const int64_t target = within(job.target[b], job.classes, astray);
  Summary<P> label;
  each_pair(job, b, [&](int, int64_t id, auto p) { label.add(within(id, job.classes, astray), P(p), target); });
  const double mass = mass_of(label, job.k, job.classes, job.policy, job.exponent, job.renorm);
  return astray && mass != 0 ? double(NAN) : mass;
}

// The rows whose labels row b mixes, and their weights; a partner outside the batch makes both weights NaN.
struct Shares {
  int64_t partner;
  double own, other;
};
__device__ Shares shares_of(const LabelJob& job, int64_t b) {
  if (job.lam == nullptr) return {b, 1.0, 0.0};
  bool astray = false;
  const int64_t partner = within(job.partner[b], job.rows, astray);
  const double lam = astray ? double(NAN) : double(job.lam[b]);
  return {partner, lam, 1.0 - lam};
}

// Decodes and adapts the label of `row` into pairs at to.ids[at...], times `weight`.
template <typename P>
__device__ Label add_label(const LabelJob& job, int64_t row, double weight, WarpTeam team, RowLabel& to, int at) {
  const int k = job.k;
  int32_t* ids = to.ids + at;
  double* deltas = to.deltas + at;  // the probabilities first
  bool astray = false;
  const int64_t target = within(job.target[row], job.classes, astray);
  if (job.codec == Codec::PAIRS) {
    team.each(k, [&](int j) {
      ids[j] = int32_t(within(job.ids[row * k + j], job.classes, astray));
      deltas[j] = double(static_cast<const P*>(job.probs)[row * k + j]);
    });
  } else if (job.codec == Codec::HALF) {
    team.each(k, [&](int j) {
      int64_t id;
      float p;
      half_pair(job.words + row * job.width, j, k, job.classes, id, p);
      ids[j] = int32_t(within(id, job.classes, astray));
      deltas[j] = double(p);
    });
  } else {
    float* rest = to.logits + at;
    team.each(k, [&](int j) {
      const PackedShare share = packed_share(job.words + row * job.width, j, k, job.grid);
      ids[j] = int32_t(within(packed_id(job.words + row * job.width, j, job.grid), job.classes, astray));
      deltas[j] = double(share.r);
      rest[j] = share.rest;
    });
    float left[MAX_K / LANES];  // what the pairs before this lane's leave
    float product = 1.0f;
    FERKD_ROLLED
    for (int j = 0; j < k; ++j) {  // in stored order, as every decoder multiplies
#pragma unroll
      for (int own = 0; own < MAX_K / LANES; ++own) left[own] = j == team.lane + own * LANES ? product : left[own];
      product = product * rest[j];
    }
    simt::sync_warp();
#pragma unroll
    for (int own = 0; own < MAX_K / LANES; ++own) {
      const int j = team.lane + own * LANES;
      if (j < k) deltas[j] = double(left[own] * float(deltas[j]));
    }
    simt::sync_warp();
  }
  Label label = adapt_label<float, P>(team, ids, deltas, k, target, job.classes, job.policy, job.exponent, job.renorm, ids, deltas);
  if (simt::any_in_warp(astray) && label.mass != 0) label.mass = double(NAN);
  team.each(label.count, [&](int j) { deltas[j] *= weight; });
  return label;
}

// The whole label of row b, by one warp; ends with a meeting of it.
template <typename P>
__device__ void make_row_label(const LossJob& job, int64_t b, WarpTeam team, RowLabel& to) {
  const Shares shares = shares_of(job.labels, b);
  double mass = 0, base = 0;
  int count = 0;
  Region region = DISCARDED;
  FERKD_ROLLED
  for (int s = 0; s < 2; ++s) {
    const double weight = s == 0 ? shares.own : shares.other;
    const bool asks_region = s == 0 && job.region != nullptr;
    if (weight == 0 && !asks_region) continue;
    const Label label = add_label<P>(job.labels, s == 0 ? b : shares.partner, weight, team, to, count);
    region = s == 0 ? label.region : region;
    if (weight == 0) continue;  // a zero-weight term is skipped, never multiplied: the logit may be inf
    mass += weight * label.mass;
    base += weight * label.base;
    count += label.count;
  }
  if (team.is_first()) {
    to.mass = mass;
    to.base = base;
    to.count = count;
    to.region = region;
    to.mass_scaled = float(mass * to.grad_scale);
    to.base_scaled = float(base * to.grad_scale);
  }
  simt::sync_warp();
}

// What multiplies a row's loss and gradient, by one warp: the partial sums of S are added in the same order everywhere.
__device__ void make_scales(const LossJob& job, WarpTeam team, RowLabel& to) {
  double scale = job.scale;
  if (job.reduction == Reduction::MEAN) {
    double total = 0;
    if (job.normalizer != nullptr) {
      total = double(*job.normalizer);
    } else {
#pragma unroll
      for (int i = 0; i < MASS_PARTS / LANES; ++i) {
        const int part = team.lane + i * LANES;
        total += part < job.mass_parts ? job.workspace->mass[part] : 0.0;
      }
      total = sum_of_warp(total);
    }
    scale = total == 0.0 ? 0.0 : scale / total;  // every row discarded: 0, never 0/0
  }
  if (team.is_first()) {
    to.loss_scale = scale;
    to.grad_scale = scale * job.labels.exponent * (job.upstream != nullptr ? double(*job.upstream) : 1.0);
  }
  simt::sync_warp();
}

// ------------------------------------------------------------------------------------------------ a row's memory

// A row is an aligned body of 16-byte vectors between a head and a tail of single elements, its edges. Of the vectors, and the edges,
// this block has its part.
template <typename T>
struct Span {
  const typename T::Element* x;  // the row's logits
  typename T::Element* grad;     // and gradient, or null
  int head, edges;               // edges: head and tail, 0 where another block has them
  int body_end;                  // the element behind the body
  int first, last;               // the vectors of this block
  bool grad_is_aligned;          // where the body's vectors are aligned in the gradient too

  __device__ Span(const LossJob& job, int64_t b, int rank, int blocks) {
    x = static_cast<const typename T::Element*>(job.logits) + b * job.row_stride;
    grad = job.grad == nullptr ? nullptr : static_cast<typename T::Element*>(job.grad) + b * job.classes;
    const int classes = int(job.classes), misaligned = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(*x));
    head = misaligned == 0 ? 0 : T::LENGTH - misaligned;
    head = head < classes ? head : classes;
    const int body = (classes - head) / T::LENGTH;
    body_end = head + body * T::LENGTH;
    edges = rank == 0 ? classes - body * T::LENGTH : 0;
    const int part = (body + blocks - 1) / blocks;
    first = rank * part < body ? rank * part : body;
    last = first + part < body ? first + part : body;
    grad_is_aligned = reinterpret_cast<uintptr_t>(grad + head) % 16 == 0;
  }
  __device__ int edge(int thread) const { return thread < head ? thread : body_end + thread - head; }  // the id of an edge
  __device__ bool has(int id) const {  // whether class id is of this block's part
    return id < head || id >= body_end ? edges > 0 : id >= head + first * T::LENGTH && id < head + last * T::LENGTH;
  }
  __device__ const void* vector(int v) const { return x + head + v * T::LENGTH; }
};

// The logits of a thread: `vectors` of the body, every `threads`-th from `begin` on, and at most one edge.
template <typename T, int VECTORS>
struct Registers {
  Vec16 vector[VECTORS];
  float edge;
};

template <bool KEEP, typename T, int VECTORS>  // KEEP: they will be read again
__device__ void load_row(Registers<T, VECTORS>& x, const Span<T>& span, int begin, int thread, int threads) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int v = begin + thread + i * threads;
    if (v < span.last) x.vector[i] = KEEP ? simt::load(span.vector(v)) : simt::load_once(span.vector(v));
  }
  if (begin == span.first && thread < span.edges) x.edge = T::get(span.x[span.edge(thread)]);
  // All loads are on their way before the first is waited for: short of predicates, the assembler would use one vector before it asks for
  // the next, and a row would take the memory's latency twice.
  simt::sync_warp();
}

// The Partial of a thread's logits. In float32 exp d takes the logits' place in the registers, where write_row finds it.
template <typename T, int VECTORS>
__device__ Partial partial_of(Registers<T, VECTORS>& x, const Span<T>& span, int begin, int thread, int threads, float slope, int target) {
  const bool has_edge = begin == span.first && thread < span.edges;
  Partial p = nothing();
  if (has_edge) {
    p.largest = x.edge;
    p.elements = 1;
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    if (begin + thread + i * threads < span.last) {
#pragma unroll
      for (int e = 0; e < T::LENGTH; ++e) p.largest = fmaxf(p.largest, T::get(x.vector[i], e));
      p.elements += T::LENGTH;
    }
  }
  if (target >= 0) {  // only with stats: where the largest logits are
    const auto look = [&](float logit, int id) {
      if (logit == p.largest && id <= target) p.flags |= id < target ? BEFORE : HIT;
    };
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int v = begin + thread + i * threads;
      if (v < span.last) {
#pragma unroll
        for (int e = 0; e < T::LENGTH; ++e) look(T::get(x.vector[i], e), span.head + v * T::LENGTH + e);
      }
    }
    if (has_edge) look(x.edge, span.edge(thread));
  }

  const float shift = shift_of(p);
  const auto add = [&](float logit) {
    const float d = logit - shift;
    const float value = simt::exp2_approximate(d * slope);
    if (d == 0.0f) {
      ++p.at_largest;
    } else {  // so written that NaN reaches the sum
      p.rest += value;
    }
    p.sum_d += d;
    return value;
  };
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    if (begin + thread + i * threads < span.last) {
#pragma unroll
      for (int e = 0; e < T::LENGTH; ++e) {
        const float value = add(T::get(x.vector[i], e));
        if constexpr (T::PER_WORD == 1) T::put(x.vector[i], e, &value);
      }
    }
  }
  if (has_edge) {
    const float value = add(x.edge);
    if constexpr (T::PER_WORD == 1) x.edge = value;
  }
  return p;
}

// The dense part of the gradient: (S softmax - beta) times the row's scale. `p` is what partial_of made of `x`, `whole` the row's.
template <typename T, int VECTORS>
__device__ void write_row(const Registers<T, VECTORS>& x, const Span<T>& span, int begin, int thread, int threads, float slope,
                          const Partial& p, const Partial& whole, const RowLabel& label) {
  const bool discarded = label.mass_scaled == 0.0f && label.mass == 0.0;
  const float shift = shift_of(p);
  const float to_whole = p.largest == whole.largest ? 1.0f : simt::exp2_approximate((p.largest - whole.largest) * slope);
  const float softmax = label.mass_scaled / (whole.rest + float(whole.at_largest)) * to_whole, base = label.base_scaled;
  const auto gradient = [&](float kept) {
    const float e = T::PER_WORD == 1 ? kept : simt::exp2_approximate((kept - shift) * slope);
    return discarded ? 0.0f : e * softmax - base;  // a constant, never 0 times something: the logits may be inf
  };
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int v = begin + thread + i * threads;
    if (v < span.last) {
      Vec16 out;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float values[T::PER_WORD];
#pragma unroll
        for (int e = 0; e < T::PER_WORD; ++e) values[e] = gradient(T::get(x.vector[i], word * T::PER_WORD + e));
        T::put(out, word, values);
      }
      typename T::Element* to = span.grad + span.head + v * T::LENGTH;
      if (span.grad_is_aligned) {
        simt::store(to, out);
      } else {  // strided rows whose logits and gradient are aligned differently
#pragma unroll
        for (int e = 0; e < T::LENGTH; ++e) T::put(to[e], T::get(out, e));
      }
    }
  }
  if (begin == span.first && thread < span.edges) T::put(span.grad[span.edge(thread)], gradient(x.edge));
}

// ------------------------------------------------------------------------------------------------ what the label's warp writes

// x[i_j] of the pairs, by the label's warp.
template <typename T>
__device__ void gather_logits(const LossJob& job, int64_t b, WarpTeam team, RowLabel& label) {
  const auto* x = static_cast<const typename T::Element*>(job.logits) + b * job.row_stride;
  team.each(label.count, [&](int j) { label.logits[j] = T::get(x[label.ids[j]]); });
}

// The loss and the statistics of row b, added up by one warp and written by the first block of a cluster.
__device__ void finish_row(const LossJob& job, int64_t b, bool writes, WarpTeam team, RowLabel& label) {
  const Partial whole = label.whole;
  // A row of -inf alone is NaN.
  const float log_sum = whole.largest == -INFINITY ? NAN : log1pf(whole.rest + float(whole.at_largest - 1));
  double pairs = 0;
  FERKD_ROLLED
  for (int j = team.lane; j < label.count; j += LANES) {
    if (label.deltas[j] != 0) pairs += label.deltas[j] * (double(label.logits[j]) - double(whole.largest));
  }
  pairs = sum_of_warp(pairs);
  double loss = 0;
  if (label.mass != 0) {
    loss = label.mass * double(log_sum) - pairs * job.labels.exponent;
    if (label.base != 0) loss -= label.base * (double(whole.sum_d) * job.labels.exponent);
    loss *= label.loss_scale;
  }
  if (team.is_first() && writes) {
    label.loss += loss;
    if (job.reduction == Reduction::NONE) job.loss[b] = float(loss);
    if (job.region != nullptr) {
      job.region[b] = label.region;
      job.correct[b] = whole.flags == HIT && !isnan(log_sum);  // the lowest id wins a tie
      job.logsumexp[b] = float(double(whole.largest) * job.labels.exponent + double(log_sum));
    }
  }
}

// The gradient at the pairs' ids of this block's part, each written once with the total of all pairs that share its id: formed in float64,
// since on a confident row it is a small difference, and rounded once. After a meeting that orders it behind the dense part.
template <typename T>
__device__ void write_pairs(const LossJob& job, int64_t b, int rank, int blocks, WarpTeam team,
                                           const RowLabel& label) {
  if (label.mass == 0) return;
  const Partial whole = label.whole;
  const Span<T> span(job, b, rank, blocks);
  const double softmax = label.mass / (double(whole.rest) + double(whole.at_largest));
  FERKD_ROLLED
  for (int j = team.lane; j < label.count; j += LANES) {
    const int id = label.ids[j];
    if (label.deltas[j] == 0 || !span.has(id)) continue;
    double total = 0;
    FERKD_ROLLED
    for (int l = 0; l < label.count; ++l) total += label.ids[l] == id ? label.deltas[l] : 0.0;
    const double e = double(simt::exp2_approximate((label.logits[j] - whole.largest) * job.slope));
    T::put(span.grad[id], float((e * softmax - label.base - total) * label.grad_scale));
  }
}

// Adds up the loss: every block hands in its part, and the last to do so adds them all in order, so that the scalar is deterministic.
__device__ void finish_loss(const LossJob& job, double part, int64_t index, double* of_warp, bool* is_last) {
  if (job.reduction == Reduction::NONE) return;
  const int thread = simt::thread_index(), threads = simt::block_threads();
  if (thread == 0) {
    job.workspace->loss[index] = part;
    *is_last = simt::take_ticket(&job.workspace->ticket) == unsigned(job.loss_parts) - 1;
  }
  simt::sync_block();
  if (!*is_last) return;
  double total = 0;
  for (int64_t i = thread; i < job.loss_parts; i += threads) total += simt::load_fresh(&job.workspace->loss[i]);
  total = sum_of_warp(total);
  if (thread % LANES == 0) of_warp[thread / LANES] = total;
  simt::sync_block();
  if (thread == 0) {
    total = 0;
    for (int warp = 0; warp < threads / LANES; ++warp) total += of_warp[warp];
    *job.loss = float(total);
  }
}

// -1, which no row hits, when nobody asks whether the row is correct, and for a target that is no class.
__device__ int target_of(const LossJob& job, int64_t b) {
  if (job.correct == nullptr) return -1;
  const int64_t target = job.labels.target[b];
  return target < 0 || target >= job.classes ? -1 : int(target);
}

__device__ void make_label(const LossJob& job, int64_t b, WarpTeam team, RowLabel& label) {
  if (job.labels.probs_are_double) {
    make_row_label<double>(job, b, team, label);
  } else {
    make_row_label<float>(job, b, team, label);
  }
}

// ------------------------------------------------------------------------------------------------ the logits kernel

// A warp a row.
template <typename T, int VECTORS>
__global__ void __launch_bounds__(ROWS_A_BLOCK* LANES, 4) rows_by_warp(const LossJob job) {
  struct Shared {
    RowLabel label[ROWS_A_BLOCK];
    double of_warp[ROWS_A_BLOCK];
    bool is_last;
  };
  FERKD_SHARED(Shared, shared);
  const int warp = simt::thread_index() / LANES;
  const WarpTeam team{simt::thread_index() % LANES};
  RowLabel& label = shared.label[warp];

  if (team.is_first()) label.loss = 0;
  bool has_scales = false;
  for (int64_t b = simt::block_index() * ROWS_A_BLOCK + warp; b < job.rows; b += simt::grid_blocks() * ROWS_A_BLOCK) {
    const Span<T> span(job, b, 0, 1);
    Registers<T, VECTORS> x;
    load_row<false>(x, span, 0, team.lane, LANES);
    if (!has_scales) make_scales(job, team, label);  // while the logits are on their way
    has_scales = true;
    make_label(job, b, team, label);
    gather_logits<T>(job, b, team, label);
    const Partial p = partial_of(x, span, 0, team.lane, LANES, job.slope, target_of(job, b));
    const Partial whole = merged_in_warp(p, job.slope);
    if (team.is_first()) label.whole = whole;
    if (span.grad != nullptr) write_row(x, span, 0, team.lane, LANES, job.slope, p, whole, label);
    simt::sync_warp();  // the dense gradient is written
    if (job.grad != nullptr) write_pairs<T>(job, b, 0, 1, team, label);
    finish_row(job, b, true, team, label);
    simt::sync_warp();  // the next row's label takes this one's place
  }
  simt::sync_block();
  double loss = 0;
  for (const RowLabel& of_row : shared.label) loss += of_row.loss;
  finish_loss(job, loss, simt::block_index(), shared.of_warp, &shared.is_last);
}

// A block or a cluster of blocks a row: the last warp of a block has the label, the others the logits. The two kinds of warp run code of
// their own, which meets at the same barriers: registers of one are not the other's. With READS_TWICE a row larger than the registers
// is walked twice.
//
//     logits warps                            label's warp
//     load, partial -> of_warp                label, scales
//     ------------------------------------ meeting of the block
//                                             of_warp -> of_block in every block (clusters)
//     ------------------------------------ meeting of the cluster (clusters)
//     whole; dense gradient                   whole; x[i_j], loss, statistics
//     ------------------------------------ meeting of the block
//     next row                                gradient at the pairs' ids; next row
struct BlockShared {
  RowLabel label;
  Partial of_warp[LANES];            // of the warps that have logits
  Partial of_block[2][MAX_CLUSTER];  // two, for rows in turn: a block may be ahead of the one it writes to
  double loss_of_warp[LANES];
  bool is_last;
};

// A row's blocks as one, after every warp has met: what each warp makes of the partials in shared memory.
__device__ Partial merged_in_row(const BlockShared& shared, int warps, int blocks, int turn, int lane, float slope) {
  if (blocks > 1) return merged_in_warp(lane < blocks ? shared.of_block[turn][lane] : nothing(), slope);
  return merged_in_warp(lane < warps ? shared.of_warp[lane] : nothing(), slope);
}

template <typename T, int VECTORS, bool READS_TWICE>
__device__ void logits_warps(const LossJob& job, BlockShared& shared, simt::Arrival here) {
  const int thread = simt::thread_index(), threads = simt::block_threads() - LANES;
  const int blocks = simt::cluster_blocks(), rank = simt::cluster_rank();
  const int step = VECTORS * threads;
  int turn = 0;
  bool is_first_row = true;
  for (int64_t b = simt::block_index() / blocks; b < job.rows; b += simt::grid_blocks() / blocks) {
    const Span<T> span(job, b, rank, blocks);
    Registers<T, VECTORS> x;
    Partial p = nothing();
    int begin = span.first;
    do {
      load_row<READS_TWICE>(x, span, begin, thread, threads);
      const Partial here = partial_of(x, span, begin, thread, threads, job.slope, target_of(job, b));
      if constexpr (!READS_TWICE) {
        p = here;
        break;
      }
      p = merged(p, here, job.slope);
      begin += step;
    } while (begin < span.last);

    const Partial of_warp = merged_in_warp(p, job.slope);
    if (thread % LANES == 0) shared.of_warp[thread / LANES] = of_warp;
    simt::sync_block();
    if (blocks > 1) {
      if (is_first_row) simt::wait_cluster(here);
      simt::sync_cluster();
    }
    is_first_row = false;
    const Partial whole = merged_in_row(shared, threads / LANES, blocks, turn, thread % LANES, job.slope);
    turn = 1 - turn;

    if (span.grad != nullptr) {
      begin = span.first;
      do {
        if constexpr (READS_TWICE) {
          load_row<false>(x, span, begin, thread, threads);
          p = partial_of(x, span, begin, thread, threads, job.slope, -1);
        }
        write_row(x, span, begin, thread, threads, job.slope, p, whole, shared.label);
        begin += step;
      } while (READS_TWICE && begin < span.last);
    }
    simt::sync_block();
  }
}

template <typename T>
__device__ void label_warp(const LossJob& job, BlockShared& shared, simt::Arrival here) {
  const WarpTeam team{simt::thread_index() % LANES};
  const int blocks = simt::cluster_blocks(), rank = simt::cluster_rank();
  if (team.is_first()) shared.label.loss = 0;
  make_scales(job, team, shared.label);
  int turn = 0;
  bool is_first_row = true;
  for (int64_t b = simt::block_index() / blocks; b < job.rows; b += simt::grid_blocks() / blocks) {
    make_label(job, b, team, shared.label);
    simt::sync_block();
    const int warps = simt::block_threads() / LANES - 1;
    if (blocks > 1) {
      if (is_first_row) simt::wait_cluster(here);
      const Partial of_block = merged_in_row(shared, warps, 1, 0, team.lane, job.slope);
      if (team.lane < blocks) simt::in_block(&shared, team.lane)->of_block[turn][rank] = of_block;
      simt::sync_cluster();
    }
    const Partial whole = merged_in_row(shared, warps, blocks, turn, team.lane, job.slope);
    if (team.is_first()) shared.label.whole = whole;
    turn = 1 - turn;
    is_first_row = false;
    gather_logits<T>(job, b, team, shared.label);  // while the others write the dense gradient
    finish_row(job, b, rank == 0, team, shared.label);
    simt::sync_block();
    if (job.grad != nullptr) write_pairs<T>(job, b, rank, blocks, team, shared.label);
    simt::sync_warp();  // the next row's label takes this one's place
  }
}

template <typename T, int VECTORS, int THREADS, bool READS_TWICE>
__global__ void __launch_bounds__(THREADS, THREADS == SMALL_THREADS ? 2 : 1) rows_by_block(const LossJob job) {
  FERKD_SHARED(BlockShared, shared);
  // Waited for before the first write to another block, which must have begun by then. Every cluster has a row.
  const simt::Arrival here = simt::arrive_cluster();
  if (simt::thread_index() >= simt::block_threads() - LANES) {
    label_warp<T>(job, shared, here);
  } else {
    logits_warps<T, VECTORS, READS_TWICE>(job, shared, here);
  }
  if (simt::cluster_rank() != 0) return;
  simt::sync_block();
  finish_loss(job, shared.label.loss, simt::block_index() / simt::cluster_blocks(), shared.loss_of_warp, &shared.is_last);
}

// ------------------------------------------------------------------------------------------------ the small kernels

constexpr int MASS_THREADS = 128;

// Sum S in parts, before the logits kernel, which needs the whole for its gradient; and the ticket at 0.
template <typename P>
__global__ void __launch_bounds__(MASS_THREADS) sum_masses(const LossJob job) {
  struct Shared {
    double of_warp[MASS_THREADS / LANES];
  };
  FERKD_SHARED(Shared, shared);
  const int thread = simt::thread_index();
  if (simt::block_index() == 0 && thread == 0) job.workspace->ticket = 0;
  double total = 0;
  if (job.reduction == Reduction::MEAN && job.normalizer == nullptr) {
    for (int64_t b = simt::block_index() * MASS_THREADS + thread; b < job.rows; b += simt::grid_blocks() * MASS_THREADS) {
      const Shares shares = shares_of(job.labels, b);
      FERKD_ROLLED
      for (int s = 0; s < 2; ++s) {
        const double weight = s == 0 ? shares.own : shares.other;
        if (weight == 0) continue;
        total += weight * own_mass<P>(job.labels, s == 0 ? b : shares.partner);
      }
    }
  }
  total = sum_of_warp(total);
  if (thread % LANES == 0) shared.of_warp[thread / LANES] = total;
  simt::sync_block();
  if (thread == 0) {
    total = 0;
    for (double part : shared.of_warp) total += part;
    job.workspace->mass[simt::block_index()] = total;
  }
}

struct FaultJob {
  LabelJob labels;
  unsigned long long* at;
};
__global__ void __launch_bounds__(MASS_THREADS) find_faults(const FaultJob job) {
  for (int64_t b = simt::block_index() * MASS_THREADS + simt::thread_index(); b < job.labels.rows; b += simt::grid_blocks() * MASS_THREADS) {
    const Fault fault = fault_of(job.labels, b);
    if (fault != Fault::NONE) simt::keep_smallest(job.at, (unsigned long long)b * 256 + (unsigned long long)fault);
  }
}

struct ScaleJob {
  void* grad;
  int64_t rows, columns;
  const float* upstream;
  bool one_per_row;
};
constexpr int SCALE_THREADS = 256;
template <typename T>
__global__ void __launch_bounds__(SCALE_THREADS) scale_rows_by_block(const ScaleJob job) {
  if (!job.one_per_row && *job.upstream == 1.0f) return;
  LossJob rows{};  // the gradient seen as logits: the same aligned bodies
  rows.logits = job.grad;
  rows.grad = job.grad;
  rows.row_stride = rows.classes = job.columns;
  for (int64_t b = simt::block_index(); b < job.rows; b += simt::grid_blocks()) {
    const float factor = job.upstream[job.one_per_row ? b : 0];
    if (factor == 1.0f) continue;
    const Span<T> span(rows, b, 0, 1);
    for (int v = simt::thread_index(); v < span.last; v += SCALE_THREADS) {
      const Vec16 x = simt::load_once(span.vector(v));
      Vec16 out;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float values[T::PER_WORD];
#pragma unroll
        for (int e = 0; e < T::PER_WORD; ++e) values[e] = T::get(x, word * T::PER_WORD + e) * factor;
        T::put(out, word, values);
      }
      simt::store(span.grad + span.head + v * T::LENGTH, out);
    }
    if (simt::thread_index() < span.edges) {
      typename T::Element& at = span.grad[span.edge(simt::thread_index())];
      T::put(at, T::get(at) * factor);
    }
  }
}

// ------------------------------------------------------------------------------------------------ choosing and launching

int rounded_up(int64_t value, int to) { return int((value + to - 1) / to * to); }

template <typename T>
void launch_logits_kernel(const LossJob& job, const Plan& plan, int64_t blocks, simt::Stream stream) {
  const auto launch = [&](auto kernel) { simt::launch(kernel, blocks, plan.threads, plan.blocks_a_row, stream, job); };
  if (plan.by_warp) {
    switch (plan.vectors) {
      case 1:
        return launch(rows_by_warp<T, 1>);
      case 2:
        return launch(rows_by_warp<T, 2>);
      case 4:
        return launch(rows_by_warp<T, 4>);
      default:
        return launch(rows_by_warp<T, 8>);
    }
  }
  if (plan.reads_twice) return launch(rows_by_block<T, 4, LARGE_THREADS, true>);
  if (plan.vectors == LARGE_VECTORS) return launch(rows_by_block<T, LARGE_VECTORS, LARGE_THREADS, false>);
  if constexpr (T::PER_WORD == 2) {
    if (plan.vectors == FULL_VECTORS) return launch(rows_by_block<T, FULL_VECTORS, SMALL_THREADS, false>);
  }
  if (plan.vectors < SMALL_VECTORS) return launch(rows_by_block<T, SMALL_VECTORS / 2, SMALL_THREADS, false>);
  return launch(rows_by_block<T, SMALL_VECTORS, SMALL_THREADS, false>);
}

template <typename F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::FLOAT32:
      return f(Float32());
    case Dtype::BFLOAT16:
      return f(BFloat16());
    case Dtype::FLOAT16:
      return f(Float16());
  }
}

}  // namespace

Plan plan_for(Dtype dtype, int64_t classes, int architecture) {
  const int length = dtype == Dtype::FLOAT32 ? Float32::LENGTH : BFloat16::LENGTH;
  const int64_t vectors = (classes + length - 1) / length;
  for (int held : {1, 2, 4, 8}) {
    if (vectors <= LANES * held) return {true, false, held, ROWS_A_BLOCK * LANES, 1};
  }
  const auto block = [&](int held, int blocks) {
    const int64_t part = (vectors + blocks - 1) / blocks;
    return Plan{false, false, held, rounded_up((part + held - 1) / held, LANES) + LANES, blocks};  // a warp more for the label
  };
  for (int held : {SMALL_VECTORS / 2, SMALL_VECTORS}) {
    if (const Plan plan = block(held, 1); plan.threads <= SMALL_THREADS) return plan;
  }
  // Several small blocks a multiprocessor load, compute and store in turn where one large block would do one after the other.
  if (architecture >= 90) {
    for (int blocks : {2, 4, MAX_CLUSTER}) {
      if (const Plan plan = block(SMALL_VECTORS, blocks); plan.threads <= SMALL_THREADS) return plan;
    }
    if (const Plan plan = block(LARGE_VECTORS, MAX_CLUSTER); plan.threads <= LARGE_THREADS) return plan;
  }
  if (const Plan plan = block(FULL_VECTORS, 1); dtype != Dtype::FLOAT32 && plan.threads <= SMALL_THREADS) return plan;
  if (const Plan plan = block(LARGE_VECTORS, 1); plan.threads <= LARGE_THREADS) return plan;
  return {false, true, 4, LARGE_THREADS, 1};
}

int compiled_architecture() { return simt::compiled_for(rows_by_warp<Float32, 1>); }

void run_loss(LossJob job, Dtype dtype, simt::Stream stream) {
  if (job.rows == 0) {
    if (job.reduction != Reduction::NONE) simt::zero(job.loss, sizeof(float), stream);
    return;
  }
  job.slope = float(1.4426950408889634 / job.labels.temperature);
  const Plan plan = plan_for(dtype, job.classes, compiled_architecture());
  const int64_t rows_a_block = plan.by_warp ? ROWS_A_BLOCK : 1;
  job.loss_parts = std::min((job.rows + rows_a_block - 1) / rows_a_block, LOSS_PARTS);
  job.mass_parts = int(std::min<int64_t>((job.rows + MASS_THREADS - 1) / MASS_THREADS, MASS_PARTS));
  if (job.reduction != Reduction::NONE) {
    const bool needs_mass = job.reduction == Reduction::MEAN && job.normalizer == nullptr;
    const auto kernel = job.labels.probs_are_double ? sum_masses<double> : sum_masses<float>;
    simt::launch(kernel, needs_mass ? job.mass_parts : 1, MASS_THREADS, 1, stream, job);
  }
  with_dtype(dtype, [&](auto type) { launch_logits_kernel<decltype(type)>(job, plan, job.loss_parts * plan.blocks_a_row, stream); });
}

void find_fault(const LabelJob& job, unsigned long long* at, simt::Stream stream) {
  simt::fill_ones(at, sizeof(*at), stream);
  if (job.rows == 0) return;
  simt::launch(find_faults, std::min<int64_t>((job.rows + MASS_THREADS - 1) / MASS_THREADS, 1024), MASS_THREADS, 1, stream, FaultJob{job, at});
}

void scale_rows(void* grad, Dtype dtype, int64_t rows, int64_t columns, const float* upstream, bool one_per_row, simt::Stream stream) {
  if (rows == 0 || columns == 0) return;
  const ScaleJob job{grad, rows, columns, upstream, one_per_row};
  with_dtype(dtype, [&](auto type) {
    simt::launch(scale_rows_by_block<decltype(type)>, std::min<int64_t>(rows, 4096), SCALE_THREADS, 1, stream, job);
  });
}

}  // namespace ferkd::cuda
