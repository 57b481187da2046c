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

namespace {
// Rows, and weights if there are any, as the kernels read them: whose elements are neighbours.
struct Rows {
  Tensor x_TH;
  std::optional<Tensor> weights_TK;

  static Rows of(const Tensor& x_TH, const std::optional<Tensor>& weights_TK) {
    return {.x_TH = dense_rows(x_TH), .weights_TK = weights_TK ? std::optional(dense_rows(*weights_TK)) : std::nullopt};
  }

  TokenBlock block() const {
    return {.x_TH = x_TH.const_data_ptr(),
            .x_pitch = row_pitch_bytes(x_TH),
            .weights_TK = weights_TK ? weights_TK->const_data_ptr() : nullptr,
            .weights_pitch = weights_TK ? weights_TK->stride(0) : 0};
  }
};

// Moves one block of tokens, or two, to y_NH; weights to weights_N, if it is there.
void permute_into(const Rows& first, const Rows* second, const Tensor& rows_TK, Tensor& y_NH, int64_t y_pitch,
                  void* weights_N, int64_t weights_N_pitch, const Context& context) {
  const Tensor rows = torch::stable::contiguous(rows_TK);
  const int64_t num_rows = y_NH.size(0);
  Tensor choice_of_row = torch::stable::new_empty(rows, {num_rows});
  const PermuteArgs args{
      .first = first.block(),
      .second = second ? second->block() : TokenBlock{},
      .num_first = first.x_TH.size(0),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .y_NH = y_NH.mutable_data_ptr(),
      .y_pitch = y_pitch,
      .num_rows = num_rows,
      .row_bytes = first.x_TH.size(1) * static_cast<int64_t>(first.x_TH.element_size()),
      .choice_of_row = choice_of_row.mutable_data_ptr<int32_t>(),
      .weights_N = weights_N,
      .weights_N_pitch = weights_N_pitch,
      .weight_bytes = first.weights_TK ? static_cast<int>(first.weights_TK->element_size()) : 0,
  };
  Context::check("permute", launch_permute(args, context.stream()));
}
}  // namespace

Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Context context(x_TH);
  const Rows rows = Rows::of(x_TH, std::nullopt);
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  permute_into(rows, nullptr, rows_TK, y_NH, row_pitch_bytes(y_NH), nullptr, 0, context);
  return y_NH;
}

Tensor permute_joined(const Tensor& x_TH, const Tensor& more_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute_joined(x_TH, more_TH, rows_TK, num_rows);
  const Context context(x_TH);
  const Rows first = Rows::of(x_TH, std::nullopt), second = Rows::of(more_TH, std::nullopt);
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  permute_into(first, &second, rows_TK, y_NH, row_pitch_bytes(y_NH), nullptr, 0, context);
  return y_NH;
}

Tensor permute_packed(const Tensor& x_TH, const Tensor& weights_TK, const std::optional<Tensor>& more_TH,
                      const std::optional<Tensor>& more_weights_TK, const Tensor& rows_TK, int64_t num_rows) {
  check_permute_packed(x_TH, weights_TK, more_TH, more_weights_TK, rows_TK, num_rows);
  const Context context(x_TH);
  const PackedRow packed(x_TH, weights_TK);
  const Rows first = Rows::of(x_TH, weights_TK);
  const std::optional<Rows> second = more_TH ? std::optional(Rows::of(*more_TH, more_weights_TK)) : std::nullopt;
  Tensor y_NP = torch::stable::new_empty(x_TH, {num_rows, packed.elements});
  void* weights_N = num_rows > 0 ? static_cast<char*>(y_NP.mutable_data_ptr()) + packed.weight_at : nullptr;
  permute_into(first, second ? &*second : nullptr, rows_TK, y_NP, packed.bytes, weights_N,
               packed.bytes / static_cast<int64_t>(weights_TK.element_size()), context);
  return y_NP;
}

std::tuple<Tensor, Tensor> permute_weighted(const Tensor& x_TH, const Tensor& weights_TK, const Tensor& rows_TK,
                                            int64_t num_rows) {
  check_permute_weighted(x_TH, weights_TK, rows_TK, num_rows);
  const Context context(x_TH);
  const Rows rows = Rows::of(x_TH, weights_TK);
  Tensor weights_N = torch::stable::new_empty(weights_TK, {num_rows});
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  permute_into(rows, nullptr, rows_TK, y_NH, row_pitch_bytes(y_NH), weights_N.mutable_data_ptr(), 1, context);
  return {y_NH, weights_N};
}

Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  const FloatType type = float_type("y_NH", y_NH);
  const FloatType weight_type = weights_TK ? float_type("weights_TK", *weights_TK) : type;
  const Context context(y_NH);
  const Tensor y = dense_rows(y_NH), rows = torch::stable::contiguous(rows_TK);
  const Tensor weights = weights_TK ? torch::stable::contiguous(*weights_TK) : rows;
  Tensor x_TH = torch::stable::new_empty(y, {rows.size(0), y.size(1)});
  const UnpermuteArgs args{
      .y_NH = y.const_data_ptr(),
      .y_pitch = row_pitch_bytes(y),
      .type = type,
      .num_rows = y.size(0),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .weights_TK = weights_TK ? weights.const_data_ptr() : nullptr,
      .weight_type = weight_type,
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .x_TH = x_TH.mutable_data_ptr(),
      .hidden = y.size(1),
      .moved_N = nullptr,
      .moved_pitch = 0,
      .moved_TK = nullptr,
      .moved_bytes = 0,
  };
  Context::check("unpermute", launch_unpermute(args, context.stream()));
  return x_TH;
}

std::tuple<Tensor, Tensor> permute_weighted_backward(const Tensor& grad_NH, const Tensor& grad_N,
                                                     const Tensor& rows_TK) {
  check_permute_weighted_backward(grad_NH, grad_N, rows_TK);
  const FloatType type = float_type("grad_NH", grad_NH);
  const Context context(grad_NH);
  const Tensor grad = dense_rows(grad_NH), rows = torch::stable::contiguous(rows_TK);
  Tensor grad_TH = torch::stable::new_empty(grad, {rows.size(0), grad.size(1)});
  Tensor grad_TK = torch::stable::new_empty(grad_N, rows.sizes());
  // memory that a tensor without elements may lack: a value is moved only where a row is named
  const void* values = grad_N.numel() > 0 ? grad_N.const_data_ptr() : static_cast<const void*>(&type);
  const UnpermuteArgs args{
      .y_NH = grad.const_data_ptr(),
      .y_pitch = row_pitch_bytes(grad),
      .type = type,
      .num_rows = grad.size(0),
      .rows_TK = rows.const_data_ptr<int32_t>(),
      .weights_TK = nullptr,
      .weight_type = type,
      .num_tokens = rows.size(0),
      .num_choices = static_cast<int>(rows.size(1)),
      .x_TH = grad_TH.mutable_data_ptr(),
      .hidden = grad.size(1),
      .moved_N = values,
      .moved_pitch = grad_N.stride(0),
      .moved_TK = grad_TK.mutable_data_ptr(),
      .moved_bytes = static_cast<int>(grad_N.element_size()),
  };
  Context::check("permute_weighted_backward", launch_unpermute(args, context.stream()));
  return {grad_TH, grad_TK};
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

Tensor swiglu(const Tensor& inner_NG, const Tensor& probs_N) {
  check_swiglu(inner_NG, probs_N);
  const FloatType type = float_type("inner_NG", inner_NG), prob_type = float_type("probs_N", probs_N);
  const Context context(inner_NG);
  const Tensor inner = torch::stable::contiguous(inner_NG), probs = torch::stable::contiguous(probs_N);
  Tensor out_NF = torch::stable::new_empty(inner, {inner.size(0), inner.size(1) / 2});
  const SwigluArgs args{
      .inner_NG = inner.const_data_ptr(),
      .type = type,
      .probs_N = probs.const_data_ptr(),
      .prob_type = prob_type,
      .num_rows = inner.size(0),
      .ffn = inner.size(1) / 2,
      .out_NF = out_NF.mutable_data_ptr(),
  };
  Context::check("swiglu", launch_swiglu(args, context.stream()));
  return out_NF;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_NF, const Tensor& inner_NG, const Tensor& probs_N) {
  check_swiglu_backward(grad_NF, inner_NG, probs_N);
  const FloatType type = float_type("inner_NG", inner_NG), prob_type = float_type("probs_N", probs_N);
  const Context context(inner_NG);
  const Tensor grad = torch::stable::contiguous(grad_NF), inner = torch::stable::contiguous(inner_NG);
  const Tensor probs = torch::stable::contiguous(probs_N);
  Tensor grad_inner = torch::stable::new_empty(inner, inner.sizes());
  Tensor grad_probs = torch::stable::new_empty(probs, probs.sizes());
  const SwigluBackwardArgs args{
      .grad_NF = grad.const_data_ptr(),
      .inner_NG = inner.const_data_ptr(),
      .type = type,
      .probs_N = probs.const_data_ptr(),
      .prob_type = prob_type,
      .num_rows = inner.size(0),
      .ffn = inner.size(1) / 2,
      .grad_inner_NG = grad_inner.mutable_data_ptr(),
      .grad_probs_N = grad_probs.mutable_data_ptr(),
  };
  Context::check("swiglu_backward", launch_swiglu_backward(args, context.stream()));
  return {grad_inner, grad_probs};
}

void zero_empty_groups(const Tensor& grad_SMK, const Tensor& ends_S) {
  check_empty_groups(grad_SMK, ends_S);
  const Context context(grad_SMK);
  const int64_t num_groups = ends_S.size(0),
                num_bytes = grad_SMK.numel() * static_cast<int64_t>(grad_SMK.element_size());
  const ZeroEmptyGroupsArgs args{
      .grad_SMK = grad_SMK.mutable_data_ptr(),
      .ends_S = ends_S.const_data_ptr<int32_t>(),
      .num_groups = num_groups,
      .group_bytes = num_groups > 0 ? num_bytes / num_groups : 0,
  };
  Context::check("zero_empty_groups", launch_zero_empty_groups(args, context.stream()));
}

std::tuple<Tensor, Tensor> chosen_experts(const Tensor& routing_map_TE, const Tensor& probs_TE, int64_t top_k) {
  check_chosen_experts(routing_map_TE, probs_TE, top_k);
  const Context context(routing_map_TE);
  const Tensor map = torch::stable::contiguous(routing_map_TE), probs = torch::stable::contiguous(probs_TE);
  Tensor ids_TK = torch::stable::new_empty(map, {map.size(0), top_k}, ScalarType::Int);
  Tensor weights_TK = torch::stable::new_empty(probs, {map.size(0), top_k});
  const ChosenExpertsArgs args{
      .routing_map_TE = static_cast<const uint8_t*>(map.const_data_ptr()),
      .probs_TE = probs.const_data_ptr(),
      .prob_bytes = static_cast<int>(probs.element_size()),
      .num_tokens = map.size(0),
      .num_experts = static_cast<int>(map.size(1)),
      .top_k = static_cast<int>(top_k),
      .ids_TK = ids_TK.mutable_data_ptr<int32_t>(),
      .weights_TK = weights_TK.mutable_data_ptr(),
  };
  Context::check("chosen_experts", launch_chosen_experts(args, context.stream()));
  return {ids_TK, weights_TK};
}

Tensor chosen_experts_backward(const Tensor& grad_TK, const Tensor& ids_TK, int64_t num_experts) {
  check_chosen_experts_backward(grad_TK, ids_TK, num_experts);
  const Context context(grad_TK);
  const Tensor grad = torch::stable::contiguous(grad_TK), ids = torch::stable::contiguous(ids_TK);
  Tensor grad_TE = torch::stable::new_empty(grad, {ids.size(0), num_experts});
  const ChosenExpertsBackwardArgs args{
      .grad_TK = grad.const_data_ptr(),
      .grad_bytes = static_cast<int>(grad.element_size()),
      .ids_TK = ids.const_data_ptr<int32_t>(),
      .num_tokens = ids.size(0),
      .top_k = static_cast<int>(ids.size(1)),
      .num_experts = static_cast<int>(num_experts),
      .grad_TE = grad_TE.mutable_data_ptr(),
  };
  Context::check("chosen_experts_backward", launch_chosen_experts_backward(args, context.stream()));
  return grad_TE;
}

std::tuple<Tensor, Tensor> chunk_rows(const Tensor& counts_QS, int64_t num_rows) {
  check_chunk_rows(counts_QS, num_rows);
  const Context context(counts_QS);
  const Tensor counts = torch::stable::contiguous(counts_QS);
  Tensor to_slots_N = torch::stable::new_empty(counts, {num_rows}, ScalarType::Int);
  Tensor to_sources_N = torch::stable::new_empty(counts, {num_rows}, ScalarType::Int);
  const ChunkRowsArgs args{
      .counts_QS = counts.const_data_ptr<int64_t>(),
      .num_sources = counts.size(0),
      .num_slots = counts.size(1),
      .num_rows = num_rows,
      .to_slots_N = to_slots_N.mutable_data_ptr<int32_t>(),
      .to_sources_N = to_sources_N.mutable_data_ptr<int32_t>(),
  };
  Context::check("chunk_rows", launch_chunk_rows(args, context.stream()));
  return {to_slots_N, to_sources_N};
}
}  // namespace smartmoe::cuda
