// Scaling a stored gradient by the upstream gradient, without asking the host what it is.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "scale_cuda.h"

namespace ferkd::cuda {
namespace {

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(float value, float& to) { to = value; }
__device__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ void narrow(float value, __half& to) { to = __float2half_rn(value); }

template <typename T>
__global__ void scale_rows_kernel(T* grad, int64_t rows, int64_t columns, const float* upstream, bool one_per_row) {
  for (int64_t b = blockIdx.x; b < rows; b += gridDim.x) {
    const float factor = upstream[one_per_row ? b : 0];
    if (factor == 1.0f) continue;
    for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
      T& at = grad[b * columns + c];
      narrow(widen(at) * factor, at);
    }
  }
}

template <typename T>
void launch(void* grad, int64_t rows, int64_t columns, const float* upstream, bool one_per_row, cudaStream_t stream) {
  const int blocks = int(std::min<int64_t>(rows, 4096));
  scale_rows_kernel<T><<<blocks, 256, 0, stream>>>(static_cast<T*>(grad), rows, columns, upstream, one_per_row);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void scale_rows(void* grad, Dtype dtype, int64_t rows, int64_t columns, const float* upstream, bool one_per_row, void* stream) {
  if (rows == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::FLOAT32:
      return launch<float>(grad, rows, columns, upstream, one_per_row, queue);
    case Dtype::BFLOAT16:
      return launch<__nv_bfloat16>(grad, rows, columns, upstream, one_per_row, queue);
    case Dtype::FLOAT16:
      return launch<__half>(grad, rows, columns, upstream, one_per_row, queue);
  }
}

}  // namespace ferkd::cuda
