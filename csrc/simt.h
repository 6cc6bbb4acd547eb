// The few operations of the hardware that the CUDA kernels stand on, under names of their own: meetings of a warp, a block and a cluster,
// 16-byte memory accesses, conversions of half types, launches. tests/simt_emulated.h offers the same ones on a CPU, where threads
// are fibers, so that the kernels' logic runs in tests on machines without a GPU.
#pragma once

#if defined(FERKD_SIMT_EMULATED)
#include "simt_emulated.h"
#else

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#define FERKD_SHARED(Type, name) __shared__ Type name  // one object a block, not constructed

namespace ferkd::simt {

constexpr bool EMULATED = false;
constexpr unsigned ALL = 0xffffffffu;

#if defined(__CUDACC__)  // bindings_cuda.cpp is the C++ compiler's
// ------------------------------------------------------------------------------------------------ where a thread is

__device__ inline int thread_index() { return int(threadIdx.x); }
__device__ inline int block_threads() { return int(blockDim.x); }
__device__ inline int64_t block_index() { return blockIdx.x; }
__device__ inline int64_t grid_blocks() { return gridDim.x; }

// ------------------------------------------------------------------------------------------------ meetings

// Each call is a meeting of all threads of the warp, block or cluster, and orders their memory accesses before and after it, for these
// threads.
__device__ inline void sync_warp() { __syncwarp(); }
// By the barrier's number and not by its place in the code: the warps of a block may run code of their own between meetings.
__device__ inline void sync_block() { asm volatile("barrier.sync 0;" ::: "memory"); }
template <typename T>
__device__ inline T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(ALL, value, lanes);
}
__device__ inline bool any_in_warp(bool value) { return __any_sync(ALL, value); }

// Blocks of a cluster: from sm_90 on; before, a block is its own cluster.
__device__ inline int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::cluster_group::num_blocks());
#else
  return 1;
#endif
}
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::cluster_group::block_rank());
#else
  return 0;
#endif
}
__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::cluster_group::sync();
#endif
}
// The two halves of a meeting of the cluster: each thread arrives and later waits.
struct Arrival {};
__device__ inline Arrival arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  if (cluster_blocks() > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
  return {};
}
__device__ inline void wait_cluster(Arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The same shared object in another block of the cluster.
template <typename T>
__device__ inline T* in_block(T* object, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::cluster_group::map_shared_rank(object, rank);
#else
  return object;
#endif
}

// ------------------------------------------------------------------------------------------------ memory

struct alignas(16) Vec16 {
  uint32_t word[4];
};
__device__ inline Vec16 load(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
// What is read once need not stay in the cache.
__device__ inline Vec16 load_once(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline void store(void* to, const Vec16& v) { *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]); }
// What other blocks wrote before they said so by take_ticket.
__device__ inline double load_fresh(const double* from) { return __ldcg(from); }
// Makes what this thread wrote visible to the device, then counts; returns how many came before.
__device__ inline unsigned take_ticket(unsigned* counter) {
  __threadfence();
  const unsigned before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}
__device__ inline void keep_smallest(unsigned long long* at, unsigned long long value) { atomicMin(at, value); }

// ------------------------------------------------------------------------------------------------ arithmetic

// 2^t, relative error 2^-22; 0 below 2^-126.
__device__ inline float exp2_approximate(float t) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
}

__device__ inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ inline float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t float_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline uint16_t float_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint32_t floats_to_bfloat16s(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ inline uint32_t floats_to_float16s(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

#endif
// ------------------------------------------------------------------------------------------------ the host's side

using Stream = cudaStream_t;

inline Stream current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<Stream>(stream);
}

// Makes a device the current one while it lives.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

template <typename Kernel, typename Job>
void launch(Kernel kernel, int64_t blocks, int threads, int blocks_a_cluster, Stream stream, const Job& job) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(blocks_a_cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = blocks_a_cluster > 1 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, job));
}

// The architecture a kernel was compiled for (80, 90, ...) on the current device; 0 when the module holds no code for it.
template <typename Kernel>
int compiled_for(Kernel kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();  // not an error to report by a later call
    return 0;
  }
  STD_CUDA_CHECK(error);
  return attributes.ptxVersion;
}

inline void zero(void* at, size_t bytes, Stream stream) { STD_CUDA_CHECK(cudaMemsetAsync(at, 0, bytes, stream)); }
inline void fill_ones(void* at, size_t bytes, Stream stream) { STD_CUDA_CHECK(cudaMemsetAsync(at, 0xff, bytes, stream)); }
// Waits for the stream: for validate=True alone.
inline void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  STD_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
}

}  // namespace ferkd::simt

#endif
