// The experts of each token and their weights, from the router's map: one pass in memory order, on one thread.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
std::tuple<Tensor, Tensor> chosen_experts(const Tensor& routing_map_TE, const Tensor& probs_TE, int64_t top_k) {
  check_chosen_experts(routing_map_TE, probs_TE, top_k);
  const Tensor map = torch::stable::contiguous(routing_map_TE), probs = torch::stable::contiguous(probs_TE);
  const int64_t num_tokens = map.size(0), num_experts = map.size(1);
  const size_t bytes = static_cast<size_t>(probs.element_size());
  Tensor ids_TK = torch::stable::new_empty(map, {num_tokens, top_k}, ScalarType::Int);
  Tensor weights_TK = torch::stable::new_zeros(probs, {num_tokens, top_k});
  const auto* chosen = static_cast<const uint8_t*>(map.const_data_ptr());
  const auto* from = static_cast<const char*>(probs.const_data_ptr());
  auto* to = static_cast<char*>(weights_TK.mutable_data_ptr());
  int32_t* ids = ids_TK.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    int64_t choices = 0;
    for (int64_t e = 0; e < num_experts && choices < top_k; ++e) {
      const size_t at = static_cast<size_t>(t * num_experts + e), choice = static_cast<size_t>(t * top_k + choices);
      if (chosen[at] == 0) continue;
      ids[choice] = static_cast<int32_t>(e);
      std::memcpy(to + choice * bytes, from + at * bytes, bytes);
      ++choices;
    }
    for (; choices < top_k; ++choices) ids[t * top_k + choices] = static_cast<int32_t>(num_experts);
  }
  return {ids_TK, weights_TK};
}

Tensor chosen_experts_backward(const Tensor& grad_TK, const Tensor& ids_TK, int64_t num_experts) {
  check_chosen_experts_backward(grad_TK, ids_TK, num_experts);
  const Tensor grad = torch::stable::contiguous(grad_TK), choices = torch::stable::contiguous(ids_TK);
  const int64_t num_tokens = choices.size(0), top_k = choices.size(1);
  const size_t bytes = static_cast<size_t>(grad.element_size());
  Tensor grad_TE = torch::stable::new_zeros(grad, {num_tokens, num_experts});
  const auto* from = static_cast<const char*>(grad.const_data_ptr());
  auto* to = static_cast<char*>(grad_TE.mutable_data_ptr());
  const int32_t* ids = choices.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts) continue;
    const size_t at = static_cast<size_t>(i / top_k * num_experts + ids[i]);
    std::memcpy(to + at * bytes, from + static_cast<size_t>(i) * bytes, bytes);
  }
  return grad_TE;
}
}  // namespace smartmoe::cpu
