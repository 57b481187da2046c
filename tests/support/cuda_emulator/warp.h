// What the threads of a warp do together: the last arriver of the mask evaluates the call for all of it.
//
// Only __syncwarp orders memory accesses. Shuffles and votes promise nothing of the kind, and ThreadSanitizer is told
// nothing.
#pragma once
#include <type_traits>

#include "block.h"

namespace cuda_emulator {
// Whether the lanes of `mask` have all arrived at this very call.
inline bool all_arrived(const Thread* warp, unsigned mask, const char* file, int line) {
  const int lanes = std::min(kLanes, block->num_threads - self().warp * kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    if (lane >= lanes) die("%s:%d: mask %08x names lane %d, the warp has %d", file, line, mask, lane, lanes);
    if (warp[lane].state == State::kDone)
      die("%s:%d: mask %08x names lane %d, which has ended", file, line, mask, lane);
    if (warp[lane].state != State::kAtWarpCall) return false;
    if (warp[lane].mask != mask || warp[lane].line != line) {
      die("warp divergence: lane %d is at %s:%d with mask %08x, lane %d at line %d with mask %08x", self().lane, file,
          line, mask, lane, warp[lane].line, warp[lane].mask);
    }
  }
  return true;
}

// evaluate(warp, lane) gives what `lane` takes from the call, as 64 bits.
template <class Evaluate>
uint64_t warp_call(unsigned mask, uint64_t value, const char* file, int line, Evaluate evaluate) {
  Thread& me = self();
  Thread* warp = &block->threads[static_cast<size_t>(me.warp) * kLanes];
  if ((mask >> me.lane & 1u) == 0) die("%s:%d: lane %d is not in its own mask %08x", file, line, me.lane, mask);
  me.in = value, me.file = file, me.line = line, me.mask = mask, me.state = State::kAtWarpCall;
  if (!all_arrived(warp, mask, file, line)) {
    wait();
    return me.out;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1u) != 0) warp[lane].out = evaluate(warp, lane);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1u) != 0) warp[lane].state = State::kReady;
  }
  if (block->seed != 0) wait();
  return me.out;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// The value of lane `source`, of the same mask.
template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  Quiet quiet;
  self().source_lane = source;
  const uint64_t bits = warp_call(mask, to_bits(value), file, line, [=](const Thread* warp, int lane) {
    const int from = warp[lane].source_lane;
    if ((mask >> from & 1u) == 0) die("%s:%d: lane %d reads lane %d, not in mask %08x", file, line, lane, from, mask);
    return warp[from].in;
  });
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

template <class T>
T shuffle_up(unsigned mask, T value, unsigned distance, const char* file, int line) {
  const int source = self().lane - static_cast<int>(distance);
  return shuffle(mask, value, source < 0 ? self().lane : source, file, line);
}

template <class T>
T shuffle_xor(unsigned mask, T value, int lanes, const char* file, int line) {
  return shuffle(mask, value, self().lane ^ lanes, file, line);
}

template <class T>
unsigned match_any(unsigned mask, T value, const char* file, int line) {
  Quiet quiet;
  return static_cast<unsigned>(warp_call(mask, to_bits(value), file, line, [=](const Thread* warp, int lane) {
    uint64_t equal = 0;
    for (int other = 0; other < kLanes; ++other) {
      if ((mask >> other & 1u) != 0 && warp[other].in == warp[lane].in) equal |= uint64_t{1} << other;
    }
    return equal;
  }));
}

inline unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  Quiet quiet;
  return static_cast<unsigned>(warp_call(mask, vote ? 1 : 0, file, line, [=](const Thread* warp, int) {
    uint64_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1u) != 0) votes |= warp[lane].in << lane;
    }
    return votes;
  }));
}

inline void syncwarp(unsigned mask, const char* file, int line) {
  Quiet quiet;
  Thread& me = self();
  char* mark = &block->threads[static_cast<size_t>(me.warp) * kLanes].warp_marks[me.num_warp_barriers++ & 1];
  release(mark);
  warp_call(mask, 0, file, line, [](const Thread*, int) { return uint64_t{0}; });
  acquire(mark);
}

// __syncwarp() with the caller's place; the mask may be left out.
struct SyncWarp {
  const char* file;
  int line;
  void operator()(unsigned mask = 0xffffffffu) const { syncwarp(mask, file, line); }
};
}  // namespace cuda_emulator
