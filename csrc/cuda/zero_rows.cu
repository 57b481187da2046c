// Rows that no choice names, found without a cleared table and without a host synchronisation.
//
// Method: choice_of_row[r] is believed only if rows[choice_of_row[r]] is r, which garbage cannot fake. A warp tests 32
// rows, a row per lane, and then clears those that fail together.
// Alternative: clear all of y beforehand. Where nothing was dropped, and that is the rule, it writes every byte twice.
#include "rows.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

template <class Vector>
__global__ void __launch_bounds__(kThreads)
    zero_unnamed_rows(const int32_t* __restrict__ rows, int64_t num_choices, const int32_t* __restrict__ choice_of_row,
                      char* __restrict__ y, int64_t y_pitch, int64_t num_rows, int64_t vectors, void* weights,
                      int64_t weights_pitch, int weight_bytes) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t warp_begin = static_cast<int64_t>(blockIdx.x) * kThreads + warp_id() * kWarpSize;
  // `begin` is the same for the whole warp, so all 32 lanes reach every __ballot_sync
  for (int64_t begin = warp_begin; begin < num_rows; begin += stride) {
    const int64_t row = begin + lane_id();
    bool unnamed = false;
    if (row < num_rows) {
      const int32_t choice = choice_of_row[row];
      unnamed = choice < 0 || choice >= num_choices || rows[choice] != row;
      if (unnamed && weights != nullptr) move_bits(nullptr, 0, weights, row * weights_pitch, weight_bytes);
    }
    unsigned left = __ballot_sync(kFullWarp, unnamed);
    for (; left != 0; left &= left - 1) {
      auto* to = reinterpret_cast<Vector*>(y + (begin + __ffs(static_cast<int>(left)) - 1) * y_pitch);
      for (int64_t c = lane_id(); c < vectors; c += kWarpSize) to[c] = Vector{};
    }
  }
}

template <class Vector>
LaunchError launch(const ZeroUnnamedRowsArgs& args, const Stream& stream) {
  const int64_t blocks = (args.num_rows + kThreads - 1) / kThreads;
  SMARTMOE_LAUNCH(zero_unnamed_rows<Vector>, dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
                  dim3(kThreads), 0, stream.handle, args.rows_TK, args.num_choices, args.choice_of_row,
                  static_cast<char*>(args.y_NH), args.y_pitch, args.num_rows,
                  args.row_bytes / static_cast<int64_t>(sizeof(Vector)), args.weights_N, args.weights_pitch,
                  args.weight_bytes);
  return last_launch_error();
}
}  // namespace

LaunchError launch_zero_unnamed_rows(const ZeroUnnamedRowsArgs& args, const Stream& stream) {
  if (args.num_rows == 0 || (args.row_bytes == 0 && args.weights_N == nullptr)) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  if (args.row_bytes % kVectorBytes == 0 && args.y_pitch % kVectorBytes == 0 && is_aligned(args.y_NH, kVectorBytes))
    return launch<uint4>(args, stream);
  return launch<uint8_t>(args, stream);
}
}  // namespace smartmoe::cuda
