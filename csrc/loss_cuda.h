// The CUDA kernels' face: what bindings_cuda.cpp hands them and where the answers go. No torch here.
#pragma once

#include <cstdint>

#include "label_math.h"
#include "simt.h"

namespace ferkd::cuda {

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum class Reduction { MEAN, SUM, NONE };

constexpr int MASS_PARTS = 64;       // partial sums of S, which every row's warp adds up in the same order
// At most so many partial sums of the loss; in the tests on a CPU few, so that blocks take several rows in turn.
constexpr int64_t LOSS_PARTS = simt::EMULATED ? 8 : 4096;

// Memory of one call, on the device.
struct Workspace {
  unsigned ticket;           // how many parts of the loss are written
  double mass[MASS_PARTS];   // sums of S; those no block writes stay unread
  double loss[LOSS_PARTS];   // sums of the rows' losses
};

// Every pointer is to device memory.
struct LossJob {
  LabelJob labels;
  const void* logits;   // [B, C], rows `row_stride` elements apart
  int64_t row_stride, rows, classes;
  double scale;         // multiplies the loss: tau_squared
  Reduction reduction;
  const float* normalizer;  // one value, or null
  const float* upstream;    // one value, or null
  float* loss;          // one value, or [B] for NONE
  void* grad;           // [B, C] contiguous, or null when no gradient is wanted
  int8_t* region;       // [B], or null without stats
  bool* correct;        // [B], or null without stats
  float* logsumexp;     // [B], or null without stats
  Workspace* workspace;  // or null for NONE
  // Set by run_loss:
  float slope;          // 1 / (T ln 2)
  int mass_parts;
  int64_t loss_parts;
};

// How the logits kernel is laid out over a row: set by the dtype and C alone.
struct Plan {
  bool by_warp;          // a warp a row, four rows a block; else a block or a cluster of blocks a row
  bool reads_twice;      // the row does not fit the registers
  int vectors;           // 16-byte vectors a thread holds
  int threads;           // of a block; with a block a row its last warp has the label and no logits
  int blocks_a_row;      // the cluster's size
};
Plan plan_for(Dtype dtype, int64_t classes, int architecture);

// Queues the loss and its gradient on `stream`.
void run_loss(LossJob job, Dtype dtype, simt::Stream stream);

// The architecture of the code that the current device would run (80, 90, ...), 0 when the module holds none for it.
int compiled_architecture();

// Writes row * 256 + Fault of the first row with wrong data to `at`, or leaves it all ones.
void find_fault(const LabelJob& job, unsigned long long* at, simt::Stream stream);

// grad[b, :] *= upstream[b] in place for a contiguous [rows, columns]; upstream is float32, one value, or one a row. Ends at once where
// the factor is 1; the product is formed in float32.
void scale_rows(void* grad, Dtype dtype, int64_t rows, int64_t columns, const float* upstream, bool one_per_row, simt::Stream stream);

}  // namespace ferkd::cuda
