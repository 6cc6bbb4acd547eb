// What csrc/simt.h offers, on a CPU: the threads of a block are fibers, which run one after the other and change where they meet. So the
// CUDA kernels' own source runs in tests on machines without a GPU: its indices, meetings, sums, patches and clusters. What it cannot
// show is a GPU's memory model and its speed.
//
// Shared memory begins as NaN. FERKD_SIMT_ORDER=reversed lets the fibers take turns from the last to the first: what depends on the
// order of threads that did not meet gives another result. FERKD_SIMT_ARCHITECTURE (90) is what the kernels believe to be compiled for.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__ static
#define __launch_bounds__(...)
#define FERKD_SHARED(Type, name) Type& name = *static_cast<Type*>(::ferkd::simt::shared_memory(sizeof(Type)))

namespace ferkd::simt {

constexpr bool EMULATED = true;

// ------------------------------------------------------------------------------------------------ fibers

struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Meeting meeting;
  unsigned char slot[2][32][8];  // what the lanes show each other, at even and odd meetings
};

struct Block;
struct Fiber {
  jmp_buf resume;
  bool started = false, done = false;
  Block* block = nullptr;
  int thread = 0;
  std::unique_ptr<char[]> stack;
};

struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
};
struct Block {
  Cluster* cluster;
  int64_t index;
  int rank, threads;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Machine {
  static constexpr size_t STACK = 64 * 1024, SHARED = 48 * 1024;
  jmp_buf scheduler;
  ucontext_t entry_context, scheduler_context;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* now = nullptr;
  int64_t grid = 0;
  bool progress = false;
  void (*body)(const void*) = nullptr;
  const void* job = nullptr;
};
inline thread_local Machine machine;

inline void yield() {
  if (_setjmp(machine.now->resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void meet(Meeting& meeting, int members) {
  const unsigned generation = meeting.generation;
  machine.progress = true;
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline void fiber_main() {
  machine.body(machine.job);
  machine.now->done = true;
  machine.progress = true;
  _longjmp(machine.scheduler, 1);
}

// Runs the fibers of one cluster until all are done.
inline void run_cluster(size_t count, bool reversed) {
  for (size_t left = count; left > 0;) {
    machine.progress = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber* fiber = machine.fibers[reversed ? count - 1 - i : i].get();
      if (fiber->done) continue;
      machine.now = fiber;
      if (_setjmp(machine.scheduler) == 0) {
        if (fiber->started) _longjmp(fiber->resume, 1);
        fiber->started = true;
        getcontext(&machine.entry_context);
        machine.entry_context.uc_stack.ss_sp = fiber->stack.get();
        machine.entry_context.uc_stack.ss_size = Machine::STACK;
        machine.entry_context.uc_link = nullptr;
        makecontext(&machine.entry_context, fiber_main, 0);
        setcontext(&machine.entry_context);
      }
      if (machine.now->done) --left;
    }
    if (!machine.progress) {
      std::fprintf(stderr, "simt_emulated: the threads of a kernel wait for each other at different meetings\n");
      std::abort();
    }
  }
}

inline void* shared_memory(size_t bytes) {
  std::vector<unsigned char>& memory = machine.now->block->shared;
  if (bytes > memory.size()) std::abort();
  return memory.data();
}

// ------------------------------------------------------------------------------------------------ where a thread is

inline int thread_index() { return machine.now->thread; }
inline int block_threads() { return machine.now->block->threads; }
inline int64_t block_index() { return machine.now->block->index; }
inline int64_t grid_blocks() { return machine.grid; }

// ------------------------------------------------------------------------------------------------ meetings

inline Warp& warp() { return machine.now->block->warps[size_t(thread_index() / 32)]; }
inline void sync_warp() { meet(warp().meeting, 32); }
inline void sync_block() { meet(machine.now->block->meeting, block_threads()); }
template <typename T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  const unsigned turn = w.meeting.generation % 2;
  const int lane = thread_index() % 32;
  std::memcpy(w.slot[turn][lane], &value, sizeof(T));
  meet(w.meeting, 32);
  std::memcpy(&value, w.slot[turn][lane ^ lanes], sizeof(T));
  return value;
}
inline bool any_in_warp(bool value) {
  int any = value;
  for (int lanes = 16; lanes > 0; lanes /= 2) any |= shuffle_xor(any, lanes);
  return any != 0;
}
inline int cluster_blocks() { return int(machine.now->block->cluster->blocks.size()); }
inline int cluster_rank() { return machine.now->block->rank; }
inline void sync_cluster() { meet(machine.now->block->cluster->meeting, cluster_blocks() * block_threads()); }
using Arrival = unsigned;
inline Arrival arrive_cluster() {
  Meeting& meeting = machine.now->block->cluster->meeting;
  const unsigned generation = meeting.generation;
  machine.progress = true;
  if (++meeting.arrived == cluster_blocks() * block_threads()) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  return generation;
}
inline void wait_cluster(Arrival generation) {
  while (machine.now->block->cluster->meeting.generation == generation) yield();
}
template <typename T>
T* in_block(T* object, int rank) {
  const Block* here = machine.now->block;
  const auto offset = reinterpret_cast<unsigned char*>(object) - here->shared.data();
  return reinterpret_cast<T*>(here->cluster->blocks[size_t(rank)]->shared.data() + offset);
}

// ------------------------------------------------------------------------------------------------ memory

struct alignas(16) Vec16 {
  uint32_t word[4];
};
inline void require_alignment(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) {
    std::fprintf(stderr, "simt_emulated: a 16-byte access at %p\n", at);
    std::abort();
  }
}
inline Vec16 load(const void* from) {
  require_alignment(from);
  Vec16 v;
  std::memcpy(&v, from, 16);
  return v;
}
inline Vec16 load_once(const void* from) { return load(from); }
inline void store(void* to, const Vec16& v) {
  require_alignment(to);
  std::memcpy(to, &v, 16);
}
inline double load_fresh(const double* from) { return *from; }
inline unsigned take_ticket(unsigned* counter) { return (*counter)++; }
inline void keep_smallest(unsigned long long* at, unsigned long long value) { *at = value < *at ? value : *at; }

// ------------------------------------------------------------------------------------------------ arithmetic

inline float exp2_approximate(float t) { return t < -126.0f ? 0.0f : exp2f(t); }
inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float float16_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return isnan(x) ? uint16_t(0x7fff) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t float_to_float16(float x) { return std::bit_cast<uint16_t>(_Float16(x)); }
inline uint32_t floats_to_bfloat16s(float low, float high) { return float_to_bfloat16(low) | uint32_t(float_to_bfloat16(high)) << 16; }
inline uint32_t floats_to_float16s(float low, float high) { return float_to_float16(low) | uint32_t(float_to_float16(high)) << 16; }

// ------------------------------------------------------------------------------------------------ the host's side

using Stream = void*;
inline Stream current_stream(int32_t) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

template <typename Kernel, typename Job>
void launch(Kernel kernel, int64_t blocks, int threads, int blocks_a_cluster, Stream, const Job& job) {
  static thread_local Kernel running;
  running = kernel;
  const char* order = std::getenv("FERKD_SIMT_ORDER");
  const bool reversed = order != nullptr && std::string(order) == "reversed";
  const size_t count = size_t(blocks_a_cluster) * size_t(threads);
  machine.grid = blocks;
  machine.body = [](const void* given) { running(*static_cast<const Job*>(given)); };
  machine.job = &job;
  while (machine.fibers.size() < count) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers.back()->stack.reset(new char[Machine::STACK]);
  }
  for (int64_t first = 0; first < blocks; first += blocks_a_cluster) {
    Cluster cluster;
    std::vector<Block> members(static_cast<size_t>(blocks_a_cluster));
    for (int rank = 0; rank < blocks_a_cluster; ++rank) {
      Block& block = members[size_t(rank)];
      block = {&cluster, first + rank, rank, threads, {}, std::vector<Warp>(size_t(threads) / 32), std::vector<unsigned char>(Machine::SHARED, 0xff)};
      cluster.blocks.push_back(&block);
      for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = *machine.fibers[size_t(rank) * size_t(threads) + size_t(thread)];
        fiber.started = fiber.done = false;
        fiber.block = &block;
        fiber.thread = thread;
      }
    }
    run_cluster(count, reversed);
  }
}

template <typename Kernel>
int compiled_for(Kernel) {
  const char* architecture = std::getenv("FERKD_SIMT_ARCHITECTURE");
  return architecture == nullptr ? 90 : std::atoi(architecture);
}
inline void zero(void* at, size_t bytes, Stream) { std::memset(at, 0, bytes); }
inline void fill_ones(void* at, size_t bytes, Stream) { std::memset(at, 0xff, bytes); }
inline void copy_to_host(void* to, const void* from, size_t bytes, Stream) { std::memcpy(to, from, bytes); }

}  // namespace ferkd::simt
