// Stands in for CUDA's header of this name, so that a host compiler turns the .cu files of csrc into functions that run
// their kernels on the CPU. For tests: it executes the logic of kernels and launchers, it says nothing about speed.
//
// It knows what csrc uses: grids, blocks, static and dynamic shared memory, __syncthreads, __syncwarp, shuffles, votes,
// match, integer atomics, vector types. It cannot show effects of weak memory order, and between two synchronising
// calls a thread is not interrupted, unless ThreadSanitizer looks for what an interruption could change. Inline PTX,
// clusters, waiting for other blocks and tensor cores are out of its reach; a multiplication and an addition are two
// roundings.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

namespace cuda_emulator {
// The deliberate bug that is switched on in kernels that tests/unit/ops/test_mutations.py compiles; 0 for none.
inline int mutant = 0;

// Draws the order of threads and blocks of later launches.
inline uint64_t& seed() {
  static uint64_t value = 0;
  return value;
}

// Threads of a block and of the one that runs after it have stacks and ThreadSanitizer fibers of their own, or what a
// thread of one block does would be ordered before what the same thread of the next block does.
constexpr size_t kSets = 2;

// ThreadSanitizer's fibers, kept because making one is slow.
inline void* const* sanitizer_fibers([[maybe_unused]] size_t count, [[maybe_unused]] uint64_t turn) {
#ifdef __SANITIZE_THREAD__
  static std::vector<void*> sets[kSets];
  std::vector<void*>& fibers = sets[turn % kSets];
  while (fibers.size() < count) fibers.push_back(__tsan_create_fiber(0));
  return fibers.data();
#else
  return nullptr;
#endif
}

inline void check_configuration(dim3 grid, dim3 block_size, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > 1024) die("a block has 1 to 1024 threads, not %u x %u", block_size.x, block_size.y);
  if (shared_bytes > 48 * 1024) die("%zu bytes of dynamic shared memory: 49152 come without asking", shared_bytes);
  const bool fits =
      grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535u && grid.z > 0 && grid.z <= 65535u;
  if (!fits) die("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
}

// Runs the blocks one after the other, in an order that the seed draws.
template <class Kernel>
void launch(dim3 grid, dim3 block_size, size_t shared_bytes, Kernel&& kernel) {
  Quiet quiet;
  check_configuration(grid, block_size, shared_bytes);
  const std::function<void()> body(std::forward<Kernel>(kernel));
  // on the heap: a later call's variables on this stack would be taken for a race with the threads' last look at it
  const auto owner = std::make_unique<Block>();
  Block& block_state = *owner;
  block_state.grid_size = grid, block_state.block_size = block_size;
  block_state.num_threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block_state.kernel = &body, block_state.dynamic_bytes = shared_bytes, block_state.seed = seed();
  block_state.threads.resize(static_cast<size_t>(block_state.num_threads));
  const size_t set_bytes = kStackBytes * block_state.threads.size(), stack_bytes = kSets * set_bytes;
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) die("no memory for the stacks");
  release(&block_state.begin_mark);

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  uint64_t random = seed() * 0x9E3779B97F4A7C15ull | 1;
  for (size_t i = order.size() - 1; seed() != 0 && i > 0; --i) std::swap(order[i], order[draw(random) % (i + 1)]);
  for (size_t turn = 0; turn < order.size(); ++turn) {
    const uint64_t i = order[turn];
    block_state.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    run_block(block_state, static_cast<char*>(stacks) + turn % kSets * set_bytes,
              sanitizer_fibers(block_state.threads.size(), turn));
  }
  acquire(&block_state.end_mark);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stacks, stack_bytes);
#endif
  munmap(stacks, stack_bytes);
}
}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::self().index)
#define blockIdx (::cuda_emulator::block->index)
#define blockDim (::cuda_emulator::block->block_size)
#define gridDim (::cuda_emulator::block->grid_size)
#define __syncthreads() ::cuda_emulator::syncthreads(__FILE__, __LINE__)
#define __syncwarp            \
  ::cuda_emulator::SyncWarp { \
    __FILE__, __LINE__        \
  }
#define __shfl_up_sync(mask, value, distance) \
  ::cuda_emulator::shuffle_up((mask), (value), (distance), __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) ::cuda_emulator::shuffle_xor((mask), (value), (lanes), __FILE__, __LINE__)
#define __ballot_sync(mask, vote) ::cuda_emulator::ballot((mask), (vote), __FILE__, __LINE__)
#define __match_any_sync(mask, value) ::cuda_emulator::match_any((mask), (value), __FILE__, __LINE__)

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

// csrc/cuda/device.cuh leaves these to the header that it includes.
#define SMARTMOE_LAUNCH(kernel, grid, block_size, shared_bytes, stream, ...) \
  ((void)(stream), ::cuda_emulator::launch((grid), (block_size), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define SMARTMOE_DYNAMIC_SHARED(type, name) \
  static const char name##_key = 0;         \
  type* name = static_cast<type*>(::cuda_emulator::shared_array(&name##_key, ::cuda_emulator::block->dynamic_bytes))
#define SMARTMOE_SHARED(type, name, extents) \
  static const char name##_key = 0;          \
  typedef type name##_type extents;          \
  name##_type& name = *static_cast<name##_type*>(::cuda_emulator::shared_array(&name##_key, sizeof(name##_type)))
