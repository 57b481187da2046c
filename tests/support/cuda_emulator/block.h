// A block: its threads, its barrier, its shared memory, and the scheduler that runs it on one OS thread.
//
// A thread runs until it waits at a synchronising call; the last arriver lets the others go on. Which ready thread runs
// next is drawn from a seed, so that a missing barrier shows as a wrong answer under some seed.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace cuda_emulator {
constexpr int kLanes = 32;

// A kernel did what CUDA forbids.
[[noreturn]] inline void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_emulator: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

inline uint64_t draw(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state >> 11;
}

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpCall, kDone };

struct Thread {
  Context context;
  State state = State::kReady;
  uint3 index{};
  int number = 0, lane = 0, warp = 0;
  const char* file = "";  // where it waits
  int line = 0;
  unsigned mask = 0;            // of the warp call it waits in
  uint64_t in = 0, out = 0;     // what it brings to a warp call and takes from it
  int source_lane = 0;          // whose value a shuffle gives it
  int priority = 0;             // of its warp, in that of the warp's first thread
  char warp_marks[2] = {0, 0};  // of the warp, in its first thread: one for every other __syncwarp
  unsigned num_warp_barriers = 0;
};

// Shared memory of one block: freshly allocated, of exactly the size asked for, full of garbage. Blocks never see each
// other's, and a sanitizer sees every step beyond it.
struct SharedArray {
  const void* key;  // the declaration
  void* memory;
};

struct Block {
  dim3 grid_size, block_size;
  uint3 index{};
  int num_threads = 0, num_alive = 0, num_arrived = 0;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  std::vector<SharedArray> shared;
  size_t dynamic_bytes = 0;
  uint64_t seed = 0, random = 1;
  unsigned num_barriers = 0;
  char barrier_marks[2] = {0, 0}, begin_mark = 0, end_mark = 0;
};

inline thread_local Block* block = nullptr;
inline Thread& self() {
  return *block->running;
}

inline void wait() {
  switch_to(self().context, block->scheduler, false);
}

inline void open_barrier() {
  block->num_arrived = 0;
  ++block->num_barriers;
  for (Thread& thread : block->threads) {
    if (thread.state == State::kAtBlockBarrier) thread.state = State::kReady;
  }
}

inline void syncthreads(const char* file, int line) {
  Quiet quiet;
  Thread& me = self();
  char* mark = &block->barrier_marks[block->num_barriers & 1];
  release(mark);
  for (const Thread& other : block->threads) {
    if (other.state != State::kAtBlockBarrier) continue;
    if (other.line != line || std::strcmp(other.file, file) != 0) {
      die("__syncthreads divergence: thread %d is at %s:%d, thread %d at %s:%d", me.number, file, line, other.number,
          other.file, other.line);
    }
    break;
  }
  me.file = file, me.line = line, me.state = State::kAtBlockBarrier;
  if (++block->num_arrived == block->num_alive) open_barrier();
  if (me.state != State::kReady || block->seed != 0) wait();
  acquire(mark);
}

// The array that the declaration `key` stands for in this block.
inline void* shared_array(const void* key, size_t bytes) {
  Quiet quiet;
  for (const SharedArray& array : block->shared) {
    if (array.key == key) return array.memory;
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, std::max<size_t>(bytes, 1)) != 0) die("no memory for a shared array");
  std::memset(memory, 0xCB, bytes);
  block->shared.push_back({key, memory});
  return memory;
}

inline void thread_main() {
  arrive(block->scheduler);
  acquire(&block->begin_mark);
  (*block->kernel)();
  release(&block->end_mark);
  {
    Quiet quiet;
    self().state = State::kDone;
    --block->num_alive;
    // threads that have left are not waited for
    if (block->num_alive > 0 && block->num_arrived == block->num_alive) open_barrier();
  }
  switch_to(self().context, block->scheduler, true);
  die("a thread that had ended was resumed");
}

// Seed 0: in the order of the threads. Odd seeds: each round runs the ready threads once, in a new order. Even seeds:
// the ready thread of the warp with the highest priority always runs, and now and then that warp becomes the last:
// unfair on purpose, so that one warp gets far ahead of another.
class Scheduler {
 public:
  explicit Scheduler(Block& of) : block_(of), order_(of.threads.size()), next_(of.seed ? order_.size() : 0) {
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
  }

  Thread* pick() { return block_.seed != 0 && block_.seed % 2 == 0 ? by_priority() : in_rounds(); }

 private:
  int& priority(const Thread& thread) { return block_.threads[static_cast<size_t>(thread.warp) * kLanes].priority; }

  Thread* by_priority() {
    Thread* best = nullptr;
    for (Thread& thread : block_.threads) {
      if (thread.state == State::kReady && (best == nullptr || priority(thread) > priority(*best))) best = &thread;
    }
    if (best != nullptr && draw(block_.random) % 24 == 0)
      priority(*best) = -static_cast<int>(draw(block_.random) % 1000);
    return best;
  }

  Thread* in_rounds() {
    for (size_t tried = 0; tried < order_.size(); ++tried) {
      if (next_ >= order_.size()) new_round();
      Thread& thread = block_.threads[order_[next_++]];
      if (thread.state == State::kReady) return &thread;
    }
    return nullptr;
  }

  void new_round() {
    next_ = 0;
    if (block_.seed == 0) return;
    for (size_t i = order_.size() - 1; i > 0; --i) std::swap(order_[i], order_[draw(block_.random) % (i + 1)]);
  }

  Block& block_;
  std::vector<size_t> order_;
  size_t next_;
};

[[noreturn]] inline void die_of_deadlock() {
  for (const Thread& thread : block->threads) {
    if (thread.state == State::kDone) continue;
    std::fprintf(stderr, "  thread %d waits at %s:%d (%s)\n", thread.number, thread.file, thread.line,
                 thread.state == State::kAtBlockBarrier ? "block barrier" : "warp call");
  }
  die("block (%u,%u,%u): deadlock, %d of %d threads alive", block->index.x, block->index.y, block->index.z,
      block->num_alive, block->num_threads);
}

// Runs all threads of `of` to their end. stacks: kStackBytes for each; fibers: ThreadSanitizer's, one for each.
inline void run_block(Block& of, char* stacks, [[maybe_unused]] void* const* fibers) {
  block = &of;
  of.random = (of.seed * 0x9E3779B97F4A7C15ull ^ (uint64_t{of.index.x} + 1) * 0xD1B54A32D192ED03ull) | 1;
  for (int i = 0; i < 4; ++i) draw(of.random);
  of.num_alive = of.num_threads, of.num_arrived = 0, of.num_barriers = 0;
  for (int i = 0; i < of.num_threads; ++i) {
    Thread& thread = of.threads[static_cast<size_t>(i)] = Thread();
    const unsigned n = static_cast<unsigned>(i), x = of.block_size.x, y = of.block_size.y;
    thread.index = {n % x, n / x % y, n / (x * y)};
    thread.number = i, thread.lane = i % kLanes, thread.warp = i / kLanes;
    thread.priority = static_cast<int>(draw(of.random) % 1000);
    char* stack = stacks + static_cast<size_t>(i) * kStackBytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#ifdef __SANITIZE_THREAD__
    thread.context.tsan_fiber = fibers[i];
    of.scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
    prepare(thread.context, stack, thread_main);
  }
  Scheduler scheduler(of);
  while (of.num_alive > 0) {
    of.running = scheduler.pick();
    if (of.running == nullptr) die_of_deadlock();
    switch_to(of.scheduler, of.running->context, false);
  }
  for (const SharedArray& array : of.shared) std::free(array.memory);
  of.shared.clear();
  block = nullptr;
}
}  // namespace cuda_emulator
