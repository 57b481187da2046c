// Torch glue of the counting sort: checks, outputs and scratch; the kernels are in dispatch_map.cu.
#include "dispatch_map.h"

#include <torch/csrc/stable/ops.h>

#include "../dispatch_checks.h"
#include "../ops.h"
#include "context.h"

namespace smartmoe::cuda {
namespace {
IntArray int_array(const Tensor& dense) {
  return {dense.const_data_ptr(), dense.scalar_type() == ScalarType::Long};
}
}  // namespace

std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots) {
  check_dispatch_map(ids_TK, slot_of_E, num_slots);
  const Context context(ids_TK);
  const Tensor ids = torch::stable::contiguous(ids_TK), slots = torch::stable::contiguous(slot_of_E);
  const int num_tiles = dispatch_map_num_tiles(ids.numel());
  Tensor tile_counts = torch::stable::new_empty(ids, {num_tiles, num_slots}, ScalarType::Int);  // bits of uint32
  Tensor rows_TK = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Int);
  Tensor tokens_S = torch::stable::new_empty(ids, {num_slots}, ScalarType::Long);
  Context::check(
      "dispatch_map",
      launch_dispatch_map(int_array(ids), ids.numel(), int_array(slots), slots.numel(), static_cast<int>(num_slots),
                          num_tiles, static_cast<uint32_t*>(tile_counts.mutable_data_ptr()),
                          rows_TK.mutable_data_ptr<int32_t>(), tokens_S.mutable_data_ptr<int64_t>(), context.launch()));
  return {rows_TK, tokens_S};
}
}  // namespace smartmoe::cuda
