// Torch's side of the ops on CUDA tensors: checks, results and scratch, and the launch. The kernels are in the .cu
// files.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "context.h"
#include "launchers.h"

namespace smartmoe::cuda {
namespace {
IntArray int_array(const Tensor& dense) {
  return {.data = dense.const_data_ptr(), .is_int64 = dense.scalar_type() == ScalarType::Long};
}

FloatType float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Float: return FloatType::kFloat32;
    default:
      fail(name, ".dtype = ", dtype_name(tensor.scalar_type()),
           ": on a GPU it must be float16, bfloat16 or float32. Convert it with ", name, ".float()");
  }
}

constexpr int64_t kSharedBytes = 48 * 1024;  // that every GPU grants without asking
}  // namespace

std::tuple<Tensor, Tensor> exact_split(const Tensor& counts_RE, int64_t spare_slots, int64_t num_nodes) {
  check_exact_split(counts_RE, spare_slots, num_nodes);
  const int64_t num_ranks = counts_RE.size(0), num_experts = counts_RE.size(1);
  const int64_t num_slots = num_experts / num_ranks + spare_slots;
  if (exact_split_shared_bytes(num_ranks, num_experts, num_slots) > kSharedBytes) {
    fail("counts_RE.shape = ", shape_text(counts_RE), ": with ", spare_slots,
         " spare slots a plan does not fit in the shared memory of a GPU. Plan on the host: counts_RE.cpu()");
  }
  const Context context(counts_RE);
  const Tensor counts = torch::stable::contiguous(counts_RE);
  Tensor slots_RS = torch::stable::new_empty(counts, {num_ranks, num_slots});
  Tensor tokens_RS = torch::stable::new_empty(counts, {num_ranks, num_slots});
  const ExactSplitArgs args{
      .counts_RE = counts.const_data_ptr<int64_t>(),
      .num_ranks = static_cast<int>(num_ranks),
      .num_experts = static_cast<int>(num_experts),
      .num_slots = static_cast<int>(num_slots),
      .num_nodes = static_cast<int>(num_nodes),
      .slots_RS = slots_RS.mutable_data_ptr<int64_t>(),
      .tokens_RS = tokens_RS.mutable_data_ptr<int64_t>(),
  };
  Context::check("exact_split", launch_exact_split(args, context.stream()));
  return {slots_RS, tokens_RS};
}

std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots) {
  check_dispatch_map(ids_TK, slot_of_E, num_slots);
  const Context context(ids_TK);
  const Tensor ids = torch::stable::contiguous(ids_TK), slots = torch::stable::contiguous(slot_of_E);
  const int num_tiles = dispatch_map_num_tiles(ids.numel());
  Tensor tile_counts = torch::stable::new_empty(ids, {num_tiles, num_slots}, ScalarType::Int);  // bits of uint32
  Tensor rows_TK = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Int);
  Tensor tokens_S = torch::stable::new_empty(ids, {num_slots}, ScalarType::Long);
  const DispatchMapArgs args{
      .ids_TK = int_array(ids),
      .num_choices = ids.numel(),
      .slot_of_E = int_array(slots),
      .num_experts = slots.numel(),
      .num_slots = static_cast<int>(num_slots),
      .num_tiles = num_tiles,
      .tile_counts = static_cast<uint32_t*>(tile_counts.mutable_data_ptr()),
      .rows_TK = rows_TK.mutable_data_ptr<int32_t>(),
      .tokens_S = tokens_S.mutable_data_ptr<int64_t>(),
  };
  Context::check("dispatch_map", launch_dispatch_map(args, context.stream()));
  return {rows_TK, tokens_S};
}

Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Context context(x_TH);
  const Tensor x = torch::stable::contiguous(x_TH), rows = torch::stable::contiguous(rows_TK);
  Tensor y_NH = torch::stable::new_empty(x, {num_rows, x.size(1)});
  Tensor choice_of_row = torch::stable::new_empty(rows, {num_rows});
  const PermuteArgs args{
      .x_TH = x.const_data_ptr(),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .y_NH = y_NH.mutable_data_ptr(),
      .num_rows = num_rows,
      .row_bytes = x.size(1) * static_cast<int64_t>(x.element_size()),
      .choice_of_row = choice_of_row.mutable_data_ptr<int32_t>(),
  };
  Context::check("permute", launch_permute(args, context.stream()));
  return y_NH;
}

Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  const FloatType type = float_type("y_NH", y_NH);
  const FloatType weight_type = weights_TK ? float_type("weights_TK", *weights_TK) : type;
  const Context context(y_NH);
  const Tensor y = torch::stable::contiguous(y_NH), rows = torch::stable::contiguous(rows_TK);
  const Tensor weights = weights_TK ? torch::stable::contiguous(*weights_TK) : rows;
  Tensor x_TH = torch::stable::new_empty(y, {rows.size(0), y.size(1)});
  const UnpermuteArgs args{
      .y_NH = y.const_data_ptr(),
      .type = type,
      .num_rows = y.size(0),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .weights_TK = weights_TK ? weights.const_data_ptr() : nullptr,
      .weight_type = weight_type,
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .x_TH = x_TH.mutable_data_ptr(),
      .hidden = y.size(1),
  };
  Context::check("unpermute", launch_unpermute(args, context.stream()));
  return x_TH;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK) {
  check_unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK);
  const FloatType type = float_type("y_NH", y_NH), weight_type = float_type("weights_TK", weights_TK);
  const Context context(y_NH);
  const Tensor grad = torch::stable::contiguous(grad_TH), y = torch::stable::contiguous(y_NH);
  const Tensor rows = torch::stable::contiguous(rows_TK), weights = torch::stable::contiguous(weights_TK);
  Tensor grad_y = torch::stable::new_empty(y, y.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  Tensor choice_of_row = torch::stable::new_empty(rows, {y.size(0)});
  const UnpermuteBackwardArgs args{
      .grad_TH = grad.const_data_ptr(),
      .y_NH = y.const_data_ptr(),
      .type = type,
      .num_rows = y.size(0),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .weights_TK = weights.const_data_ptr(),
      .weight_type = weight_type,
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .grad_y_NH = grad_y.mutable_data_ptr(),
      .grad_weights_TK = grad_weights.mutable_data_ptr(),
      .hidden = y.size(1),
      .choice_of_row = choice_of_row.mutable_data_ptr<int32_t>(),
  };
  Context::check("unpermute_backward", launch_unpermute_backward(args, context.stream()));
  return {grad_y, grad_weights};
}
}  // namespace smartmoe::cuda
