// The CUDA part's face: one launch that scales a stored gradient.
#pragma once

#include <cstdint>

namespace ferkd::cuda {

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };

// grad[b, :] *= upstream[b] in place for a contiguous [rows, columns]; upstream is float32 on the device, one value, or one a row.
// Ends at once where the factor is 1; the product is formed in float32. Queued on `stream` (a cudaStream_t).
void scale_rows(void* grad, Dtype dtype, int64_t rows, int64_t columns, const float* upstream, bool one_per_row, void* stream);

}  // namespace ferkd::cuda
