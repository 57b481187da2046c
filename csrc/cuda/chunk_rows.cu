// Where each row goes when chunks of rows in the order (source, slot) are sorted by slot, and the way back.
//
// Method: a block per chunk. Its threads add up the chunks before it in both orders, by shuffles and over shared
// memory, and then write the chunk's part of both maps. Nothing waits for another block, and no scratch is needed.
// Alternative: a prefix over all chunks in a kernel of its own. The counts are some KiB, which every block finds in L2.
#include "rows.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

__global__ void __launch_bounds__(kThreads)
    map_chunk(const int64_t* __restrict__ counts, int64_t num_sources, int64_t num_slots, int64_t num_rows,
              int32_t* __restrict__ to_slots, int32_t* __restrict__ to_sources) {
  SMARTMOE_SHARED(int, partial, [2][kWarps]);
  const int64_t chunk = blockIdx.x, source = chunk / num_slots, slot = chunk % num_slots;
  int arrived = 0, sorted = 0;  // rows before this chunk, in each order
  for (int64_t i = threadIdx.x; i < num_sources * num_slots; i += kThreads) {
    const int count = static_cast<int>(counts[i]);
    if (i < chunk) arrived += count;
    if (i % num_slots < slot || (i % num_slots == slot && i / num_slots < source)) sorted += count;
  }
  arrived = warp_sum(arrived);
  sorted = warp_sum(sorted);
  if (lane_id() == 0) partial[0][warp_id()] = arrived, partial[1][warp_id()] = sorted;
  __syncthreads();
  int from = 0, to = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) from += partial[0][warp], to += partial[1][warp];
  const int64_t count = counts[chunk];
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (from + i >= num_rows || to + i >= num_rows) return;  // counts of other rows than these
    to_slots[from + i] = static_cast<int32_t>(to + i);
    to_sources[to + i] = static_cast<int32_t>(from + i);
  }
}
}  // namespace

LaunchError launch_chunk_rows(const ChunkRowsArgs& args, const Stream& stream) {
  const int64_t chunks = args.num_sources * args.num_slots;
  if (chunks == 0 || args.num_rows == 0) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  SMARTMOE_LAUNCH(map_chunk, dim3(static_cast<unsigned>(chunks)), dim3(kThreads), 0, stream.handle, args.counts_QS,
                  args.num_sources, args.num_slots, args.num_rows, args.to_slots_N, args.to_sources_N);
  return last_launch_error();
}
}  // namespace smartmoe::cuda
