// Stable counting sort of the choices by slot on the GPU: two launches, no global atomic, nothing to clear, no host
// synchronisation, the same bits every time.
//
// Method: every block owns one tile, a contiguous range of choices. The first kernel counts each tile by slot. In the
// second each block finds, from the counts of all tiles, the first row of each slot for its own tile, and then gives
// the rows out in the order of the choices: warps count what they hold (__match_any_sync), a prefix over the warps of
// the block follows, and each lane adds its rank among the equal lanes before it. Alternative: a third kernel that
// scans the tile counts, or a decoupled look-back in one kernel. With at most 64 tiles the counts are some 64 KiB that
// every block reads from L2, which costs less than another launch and waits for no one.
#include "device.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kIdsPerThread = 8;
constexpr int kIdsPerWarp = kIdsPerThread * kWarpSize;
constexpr int kIdsPerStep = kIdsPerThread * kThreads;  // fits the 16 bits of a warp's count
constexpr int kMaxTiles = 64;

__device__ __forceinline__ int64_t at(const IntArray& array, int64_t i) {
  return array.is_int64 ? static_cast<const int64_t*>(array.data)[i]
                        : static_cast<int64_t>(static_cast<const int32_t*>(array.data)[i]);
}

// The choices and how they are cut into tiles.
struct Choices {
  IntArray ids;
  int64_t num_choices;
  IntArray slot_of;
  int64_t num_experts;
  int num_slots;
  int64_t per_tile;  // a multiple of kIdsPerStep

  __device__ __forceinline__ int64_t tile_begin() const { return static_cast<int64_t>(blockIdx.x) * per_tile; }
  __device__ __forceinline__ int64_t tile_end() const {
    const int64_t end = tile_begin() + per_tile;
    return end < num_choices ? end : num_choices;
  }

  // The slot of a choice, or -1 for one that is dropped or at or behind `end`.
  __device__ __forceinline__ int slot(int64_t choice, int64_t end) const {
    if (choice >= end) return -1;
    const int64_t expert = at(ids, choice);
    if (expert < 0 || expert >= num_experts) return -1;
    const int64_t slot = at(slot_of, expert);
    return slot >= 0 && slot < num_slots ? static_cast<int>(slot) : -1;
  }
};

// Shared: counts of this tile, [S].
__global__ void __launch_bounds__(kThreads) count_slots(Choices choices, uint32_t* __restrict__ tile_counts) {
  SMARTMOE_DYNAMIC_SHARED(uint32_t, counts);
  const int thread = static_cast<int>(threadIdx.x), num_slots = choices.num_slots;
  for (int s = thread; s < num_slots; s += kThreads) counts[s] = 0;
  __syncthreads();

  const int64_t end = choices.tile_end();
  // `step` is the same for the whole block, so all 32 lanes reach every __match_any_sync
  for (int64_t step = choices.tile_begin(); step < end; step += kIdsPerStep) {
    int slot[kIdsPerThread];
#pragma unroll
    for (int i = 0; i < kIdsPerThread; ++i) slot[i] = choices.slot(step + i * kThreads + thread, end);
#pragma unroll
    for (int i = 0; i < kIdsPerThread; ++i) {
      const unsigned peers = __match_any_sync(kFullWarp, slot[i]);
      const bool leader = lane_id() == __ffs(static_cast<int>(peers)) - 1;
      if (leader && slot[i] >= 0) atomicAdd(&counts[slot[i]], static_cast<uint32_t>(__popc(peers)));
    }
  }
  __syncthreads();

  uint32_t* row = tile_counts + static_cast<int64_t>(blockIdx.x) * num_slots;
  for (int s = thread; s < num_slots; s += kThreads) row[s] = counts[s];
}

__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));
    if (lane_id() >= distance) value += other;
  }
  return value;
}

// Sum of `value` over the threads before this one; `total` is that of the block. sums: shared scratch [kWarps].
__device__ __forceinline__ int block_exclusive_sum(int value, int* sums, int& total) {
  const int inclusive = warp_inclusive_sum(value);
  if (lane_id() == kWarpSize - 1) sums[warp_id()] = inclusive;
  __syncthreads();
  if (warp_id() == 0) {
    const int sum = warp_inclusive_sum(lane_id() < kWarps ? sums[lane_id()] : 0);
    if (lane_id() < kWarps) sums[lane_id()] = sum;
  }
  __syncthreads();
  total = sums[kWarps - 1];
  const int before = warp_id() > 0 ? sums[warp_id() - 1] : 0;
  __syncthreads();  // sums may be used again
  return before + inclusive - value;
}

// Writes the first row of each slot for this block's tile to next_row [S], and, in block 0, the rows of each slot.
__device__ __forceinline__ void find_first_rows(const uint32_t* __restrict__ tile_counts, int num_slots, int* next_row,
                                                int* sums, int64_t* __restrict__ tokens) {
  const int num_tiles = static_cast<int>(gridDim.x), tile_here = static_cast<int>(blockIdx.x);
  int first_row = 0;
  for (int begin = 0; begin < num_slots; begin += kThreads) {
    const int s = begin + static_cast<int>(threadIdx.x);
    int in_slot = 0, in_tiles_before = 0;
    if (s < num_slots) {
#pragma unroll 16
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int count = static_cast<int>(tile_counts[static_cast<int64_t>(tile) * num_slots + s]);
        in_slot += count;
        in_tiles_before += tile < tile_here ? count : 0;
      }
    }
    int total = 0;
    const int in_slots_before = block_exclusive_sum(in_slot, sums, total);
    if (s < num_slots) {
      next_row[s] = first_row + in_slots_before + in_tiles_before;
      if (tile_here == 0) tokens[s] = in_slot;
    }
    first_row += total;
  }
}

// The number of equal slots before this thread's in its warp's share of the step, which begins at choice `first`.
// counts: of this warp, [S], zero beforehand and the warp's counts afterwards.
__device__ __forceinline__ void rank_in_warp(const Choices& choices, int64_t first, int64_t end, uint16_t* counts,
                                             int (&slot)[kIdsPerThread], int (&rank)[kIdsPerThread]) {
#pragma unroll
  for (int i = 0; i < kIdsPerThread; ++i) slot[i] = choices.slot(first + i * kWarpSize + lane_id(), end);
#pragma unroll
  for (int i = 0; i < kIdsPerThread; ++i) {
    const unsigned peers = __match_any_sync(kFullWarp, slot[i]);
    const int before = __popc(peers & ((1u << lane_id()) - 1u));
    const int counted = slot[i] >= 0 ? counts[slot[i]] : 0;
    __syncwarp();  // all lanes have read the count that one of them changes
    if (slot[i] >= 0 && before == 0) counts[slot[i]] = static_cast<uint16_t>(counted + __popc(peers));
    __syncwarp();
    rank[i] = counted + before;
  }
}

// Shared: next_row [S], sums [kWarps], counts [kWarps, S].
__global__ void __launch_bounds__(kThreads) place_choices(Choices choices, const uint32_t* __restrict__ tile_counts,
                                                          int32_t* __restrict__ rows, int64_t* __restrict__ tokens) {
  SMARTMOE_DYNAMIC_SHARED(int, next_row);
  const int thread = static_cast<int>(threadIdx.x), num_slots = choices.num_slots;
  int* sums = next_row + num_slots;
  uint16_t* counts = reinterpret_cast<uint16_t*>(sums + kWarps);
  uint16_t* warp_counts = counts + warp_id() * num_slots;
  find_first_rows(tile_counts, num_slots, next_row, sums, tokens);

  const int64_t end = choices.tile_end();
  for (int64_t step = choices.tile_begin(); step < end; step += kIdsPerStep) {
    for (int i = thread; i < kWarps * num_slots; i += kThreads) counts[i] = 0;
    __syncthreads();
    const int64_t first = step + warp_id() * kIdsPerWarp;
    int slot[kIdsPerThread], rank[kIdsPerThread];
    rank_in_warp(choices, first, end, warp_counts, slot, rank);
    __syncthreads();
    // Counts become distances from the end of the step's rows: next_row can move on to there right away.
    for (int s = thread; s < num_slots; s += kThreads) {
      int distance = 0;
      for (int warp = kWarps - 1; warp >= 0; --warp) {
        distance += counts[warp * num_slots + s];
        counts[warp * num_slots + s] = static_cast<uint16_t>(distance);
      }
      next_row[s] += distance;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kIdsPerThread; ++i) {
      const int64_t choice = first + i * kWarpSize + lane_id();
      if (choice < end) rows[choice] = slot[i] >= 0 ? next_row[slot[i]] - warp_counts[slot[i]] + rank[i] : -1;
    }
    __syncthreads();  // counts are cleared for the next step
  }
}

int64_t steps_for(int64_t num_choices) {
  return (num_choices + kIdsPerStep - 1) / kIdsPerStep;
}
}  // namespace

int dispatch_map_num_tiles(int64_t num_choices) {
  const int64_t steps = steps_for(num_choices);
  return static_cast<int>(steps < 1 ? 1 : steps > kMaxTiles ? kMaxTiles : steps);
}

LaunchError launch_dispatch_map(const DispatchMapArgs& args, const Stream& stream) {
  if (const LaunchError error = set_device(stream)) return error;
  const int64_t steps_per_tile = (steps_for(args.num_choices) + args.num_tiles - 1) / args.num_tiles;
  const Choices choices{
      .ids = args.ids_TK,
      .num_choices = args.num_choices,
      .slot_of = args.slot_of_E,
      .num_experts = args.num_experts,
      .num_slots = args.num_slots,
      .per_tile = steps_per_tile * kIdsPerStep,
  };
  const size_t slots = static_cast<size_t>(args.num_slots);
  SMARTMOE_LAUNCH(count_slots, dim3(args.num_tiles), dim3(kThreads), slots * sizeof(uint32_t), stream.handle, choices,
                  args.tile_counts);
  if (const LaunchError error = last_launch_error()) return error;
  const size_t shared_bytes = (slots + kWarps) * sizeof(int) + kWarps * slots * sizeof(uint16_t);
  SMARTMOE_LAUNCH(place_choices, dim3(args.num_tiles), dim3(kThreads), shared_bytes, stream.handle, choices,
                  args.tile_counts, args.rows_TK, args.tokens_S);
  return last_launch_error();
}
}  // namespace smartmoe::cuda
