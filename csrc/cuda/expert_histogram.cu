// Expert histogram on the GPU: two launches, no global atomic, nothing to clear, no host synchronisation, so it can be
// captured in a CUDA graph and gives the same bits every time.
//
// Method: each block counts its share of the ids in shared memory, with one shared atomic per distinct expert in a warp
// (__match_any_sync), and writes one row of tile_counts [N, E]; a second kernel adds the rows up.
// Alternative: an atomic per id, on shared or global memory. Routing is skewed, the hottest of 32 experts was seen with
// 36 % of all tokens, and then a dozen lanes of every warp queue for one address; aggregated by warp, skew means fewer
// atomics. The rows also are what a stable counting sort needs to place each block's tokens.
#include "device.h"
#include "expert_histogram.h"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kIdsPerThread = 8;  // loads in flight before the first is used
constexpr int kIdsPerStep = kThreads * kIdsPerThread;
// About four blocks for each of a Hopper's 132 multiprocessors. Beyond that blocks stride over the ids, which also
// bounds the scratch and the second kernel's work.
constexpr int kMaxTiles = 512;

constexpr int kSumExperts = kWarpSize;  // experts per block of the second kernel: a coalesced row segment
constexpr int kSumSlices = 8;           // tiles are added by this many threads per expert

// The expert that ids[i] names, or -1 for a dropped, foreign or absent id.
template <class Id>
__device__ __forceinline__ int expert_at(const Id* __restrict__ ids, int64_t i, int64_t num_ids, int num_experts) {
  if (i >= num_ids) return -1;
  const int64_t id = static_cast<int64_t>(ids[i]);
  return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
}

// Shared: counts of this block, [E]. A block sees at most num_ids / kMaxTiles + kIdsPerStep ids, so 32 bits hold its
// counts for 2^41 ids: more than any device can store.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    count_tiles(const Id* __restrict__ ids, int64_t num_ids, int num_experts, uint32_t* __restrict__ tile_counts) {
  SMARTMOE_DYNAMIC_SHARED(uint32_t, counts);
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kIdsPerStep;
  // `step` is the same for the whole block, so all 32 lanes reach every __match_any_sync
  for (int64_t step = static_cast<int64_t>(blockIdx.x) * kIdsPerStep; step < num_ids; step += stride) {
    int expert[kIdsPerThread];
#pragma unroll
    for (int j = 0; j < kIdsPerThread; ++j)
      expert[j] = expert_at(ids, step + j * kThreads + thread, num_ids, num_experts);
#pragma unroll
    for (int j = 0; j < kIdsPerThread; ++j) {
      const unsigned peers = __match_any_sync(kFullWarp, expert[j]);
      const bool leader = lane_id() == __ffs(static_cast<int>(peers)) - 1;
      if (leader && expert[j] >= 0) atomicAdd(&counts[expert[j]], static_cast<uint32_t>(__popc(peers)));
    }
  }
  __syncthreads();

  uint32_t* row = tile_counts + static_cast<int64_t>(blockIdx.x) * num_experts;
  for (int e = thread; e < num_experts; e += kThreads) row[e] = counts[e];
}

// counts[e] = sum over tiles. Block (kSumExperts, kSumSlices): x is the expert, y a slice of the tiles.
__global__ void __launch_bounds__(kSumExperts* kSumSlices)
    sum_tiles(const uint32_t* __restrict__ tile_counts, int num_tiles, int num_experts, int64_t* __restrict__ counts) {
  SMARTMOE_SHARED(int64_t, partial, [kSumSlices][kSumExperts]);
  const int expert = static_cast<int>(blockIdx.x) * kSumExperts + static_cast<int>(threadIdx.x);
  const int slice = static_cast<int>(threadIdx.y);
  int64_t sum = 0;
  if (expert < num_experts) {
#pragma unroll 8
    for (int tile = slice; tile < num_tiles; tile += kSumSlices)
      sum += tile_counts[static_cast<int64_t>(tile) * num_experts + expert];
  }
  partial[slice][threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || expert >= num_experts) return;
#pragma unroll
  for (int s = 1; s < kSumSlices; ++s) sum += partial[s][threadIdx.x];
  counts[expert] = sum;
}
}  // namespace

int expert_histogram_num_tiles(int64_t num_ids) {
  const int64_t tiles = (num_ids + kIdsPerStep - 1) / kIdsPerStep;
  return static_cast<int>(tiles < 1 ? 1 : tiles > kMaxTiles ? kMaxTiles : tiles);
}

LaunchError launch_expert_histogram(const void* ids, bool ids_are_int64, int64_t num_ids, int num_experts,
                                    uint32_t* tile_counts, int64_t* counts, const Launch& where) {
  if (const LaunchError error = enter(where)) return error;
  const int tiles = expert_histogram_num_tiles(num_ids);
  const size_t shared_bytes = static_cast<size_t>(num_experts) * sizeof(uint32_t);
  if (ids_are_int64) {
    SMARTMOE_LAUNCH(count_tiles<int64_t>, dim3(tiles), dim3(kThreads), shared_bytes, where.stream,
                    static_cast<const int64_t*>(ids), num_ids, num_experts, tile_counts);
  } else {
    SMARTMOE_LAUNCH(count_tiles<int32_t>, dim3(tiles), dim3(kThreads), shared_bytes, where.stream,
                    static_cast<const int32_t*>(ids), num_ids, num_experts, tile_counts);
  }
  if (const LaunchError error = leave()) return error;
  SMARTMOE_LAUNCH(sum_tiles, dim3((num_experts + kSumExperts - 1) / kSumExperts), dim3(kSumExperts, kSumSlices), 0,
                  where.stream, tile_counts, tiles, num_experts, counts);
  return leave();
}
}  // namespace smartmoe::cuda
