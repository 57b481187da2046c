// Torch glue of the expert histogram: checks, outputs and scratch; the kernels are in expert_histogram.cu.
#include "expert_histogram.h"

#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "context.h"

namespace smartmoe::cuda {
Tensor expert_histogram(const Tensor& ids, int64_t num_experts) {
  check_ids(ids);
  check_num_experts(num_experts);
  const Context context(ids);
  const Tensor dense = torch::stable::contiguous(ids);
  const int64_t tiles = expert_histogram_num_tiles(dense.numel());
  Tensor tile_counts_NE = torch::stable::new_empty(ids, {tiles, num_experts}, ScalarType::Int);  // bits of uint32
  Tensor counts_E = torch::stable::new_empty(ids, {num_experts}, ScalarType::Long);
  Context::check(
      "expert_histogram",
      launch_expert_histogram(dense.const_data_ptr(), ids.scalar_type() == ScalarType::Long, dense.numel(),
                              static_cast<int>(num_experts), static_cast<uint32_t*>(tile_counts_NE.mutable_data_ptr()),
                              counts_E.mutable_data_ptr<int64_t>(), context.launch()));
  return counts_E;
}
}  // namespace smartmoe::cuda
