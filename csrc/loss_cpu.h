// The CPU kernel's face: what bindings.cpp hands it and where the answers go. No torch here.
#pragma once

#include <cstdint>

#include "label_math.h"

namespace ferkd::cpu {

enum class Dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// The labels after their own region's rule, before mixing.
struct AdaptedLabels {
  double* mass;    // S [B]
  double* base;    // beta [B]
  int32_t* count;  // [B]: the pairs below, at most K: those of the same id are one, and none has an increment of 0
  int8_t* region;  // [B]
  int32_t* ids;    // [B, k]
  double* deltas;  // [B, k]
  Fault* fault;    // [B]
};

// Rows [begin, end) of the labels: unpack, check, adapt. A is the type tempering's powers are taken in: double for float64 logits (float64
// probabilities take them in double whatever A is).
template <typename A>
void adapt_rows(const LabelJob& job, const AdaptedLabels& out, int64_t begin, int64_t end);

// The weight and the row of each label that row b is a mix of: itself and its partner. Returns how many have a weight.
struct Share {
  int64_t row;
  double weight;
};
inline int shares_of(const LabelJob& job, int64_t b, Share out[2]) {
  if (job.lam == nullptr) {
    out[0] = {b, 1.0};
    return 1;
  }
  int count = 0;
  const double lam = job.lam[b];
  if (lam != 0.0) out[count++] = {b, lam};
  if (lam != 1.0) out[count++] = {job.partner[b], 1.0 - lam};
  return count;
}

struct LossJob {
  Dtype dtype;
  const void* logits;   // [B, C], rows `row_stride` elements apart
  int64_t row_stride, rows, classes;
  double temperature;
  double loss_scale;    // multiplies a row's loss
  double grad_scale;    // multiplies d row loss / d z: tau_squared, normalizer, upstream and 1 / T
  const LabelJob* labels;
  const AdaptedLabels* adapted;
  double* row_loss;     // [B]
  void* grad;           // [B, C] contiguous, or null when no gradient is wanted
  bool* correct;        // [B], or null without stats
  void* logsumexp;      // [B] of A, or null without stats
};

using RowsKernel = void (*)(const LossJob&, int64_t begin, int64_t end);

// grad[b, :] *= factor of row b, formed in A; rows whose factor is 1 are not touched.
struct ScaleJob {
  void* grad;            // [B, C] contiguous
  int64_t classes;
  const void* upstream;  // A: one value, or one a row
  bool one_per_row;
};
using ScaleKernel = void (*)(const ScaleJob&, int64_t begin, int64_t end);

// The kernels of an instruction set ("plain", "avx2", "avx512"), which chosen_isa() has found to run here.
RowsKernel rows_kernel(Dtype dtype, const char* isa);
ScaleKernel scale_kernel(Dtype dtype, const char* isa);

// The instruction set in use: FERKD_CPU when set, else the best this processor has. Throws std::invalid_argument when FERKD_CPU
// names one that cannot run here.
const char* chosen_isa();

}  // namespace ferkd::cpu
