// Clears the groups that have no rows, in place: only these are written, and nothing but the ends is read.
#include "rows.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 64;  // of a group
constexpr int64_t kMaxGroups = 65535;

template <class Vector>
__global__ void __launch_bounds__(kThreads)
    zero_empty(const int32_t* __restrict__ ends_S, int64_t first_group, int64_t vectors, Vector* __restrict__ grad) {
  const int64_t group = first_group + blockIdx.y;
  if (ends_S[group] != (group > 0 ? ends_S[group - 1] : 0)) return;
  Vector* to = grad + group * vectors;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < vectors; c += stride)
    to[c] = Vector{};
}

template <class Vector>
LaunchError launch(const ZeroEmptyGroupsArgs& args, const Stream& stream) {
  const int64_t vectors = args.group_bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t blocks = (vectors + kThreads - 1) / kThreads;
  for (int64_t first = 0; first < args.num_groups; first += kMaxGroups) {
    const int64_t groups = args.num_groups - first < kMaxGroups ? args.num_groups - first : kMaxGroups;
    const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), static_cast<unsigned>(groups));
    SMARTMOE_LAUNCH(zero_empty<Vector>, grid, dim3(kThreads), 0, stream.handle, args.ends_S, first, vectors,
                    static_cast<Vector*>(args.grad_SMK));
    if (const LaunchError error = last_launch_error()) return error;
  }
  return nullptr;
}
}  // namespace

LaunchError launch_zero_empty_groups(const ZeroEmptyGroupsArgs& args, const Stream& stream) {
  if (args.num_groups == 0 || args.group_bytes == 0) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  if (args.group_bytes % kVectorBytes == 0 && is_aligned(args.grad_SMK, kVectorBytes))
    return launch<uint4>(args, stream);
  return launch<uint8_t>(args, stream);
}
}  // namespace smartmoe::cuda
