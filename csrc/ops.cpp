// Schemas and registrations, a line per op and key. Written against torch's stable ABI: no Python.h, no ATen header, so
// one binary serves every Python and every torch since 2.10.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(smartmoe, m) {
  m.def("digest_sum(Tensor bits_N, Tensor positions_L, int width, int value_factor) -> int");
  m.def("min_max_split(Tensor counts_RE, Tensor hosts_ER) -> Tensor");
  m.def("exact_replicas(Tensor load_E, Tensor slots_RS, int home_slots, int num_nodes, int trials) -> Tensor");
  m.def(
      "history_replicas(Tensor slots_RS, Tensor loads_KE, int home_slots, int num_nodes, bool many, int max_steps, "
      "int max_experts, int max_slots, int trials, float good_enough, float worst_weight, float replica_price, "
      "float change_price, float min_gain, float enough) -> (Tensor, Tensor, Tensor)");
  m.def(
      "swap_homes(Tensor slots_RS, Tensor loads_KE, int home_slots, int num_nodes, int max_steps, int max_experts, "
      "int max_slots, int trials, float worst_weight, float replica_price, float change_price, float home_price, "
      "float min_gain, float enough) -> (Tensor, Tensor, Tensor)");
  m.def("paying_replicas(Tensor loads_KE, Tensor slots_RS, int home_slots, Tensor price_23, int num_nodes) -> Tensor");
  m.def(
      "exact_plan(Tensor load_E, Tensor slots_RS, int home_slots, int scope_nodes, bool or_group, float limit, "
      "Tensor price_23, int num_nodes) -> (Tensor, int)");
  m.def("relay_tree(Tensor slots_RS, int home_slots, int num_nodes) -> Tensor");
  m.def(
      "relayed_flow(Tensor counts_RE, Tensor slots_RS, int home_slots, int num_nodes, Tensor? kept_RS) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "plan_dispatch(Tensor counts_RPE, Tensor(a!) slots_RS, int home_slots, int num_nodes, int rank, int tp_rank, "
      "int? used_slots, int scope_nodes, bool or_group, float limit, Tensor price_23, Tensor(b!) plan) -> ()");
  m.def("exact_split(Tensor counts_RE, int spare_slots, int num_nodes) -> (Tensor, Tensor)");
  m.def("dispatch_map(Tensor ids_TK, Tensor slot_of_E, int num_slots) -> (Tensor, Tensor)");
  m.def("permute(Tensor x_TH, Tensor rows_TK, int num_rows) -> Tensor");
  m.def("permute_joined(Tensor x_TH, Tensor more_TH, Tensor rows_TK, int num_rows) -> Tensor");
  m.def(
      "permute_packed(Tensor x_TH, Tensor weights_TK, Tensor? more_TH, Tensor? more_weights_TK, Tensor rows_TK, "
      "int num_rows) -> Tensor");
  m.def("unpermute(Tensor y_NH, Tensor rows_TK, Tensor? weights_TK) -> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_TH, Tensor y_NH, Tensor rows_TK, Tensor weights_TK) -> "
      "(Tensor, Tensor)");
  m.def("swiglu(Tensor inner_NG, Tensor probs_N) -> Tensor");
  m.def("swiglu_backward(Tensor grad_NF, Tensor inner_NG, Tensor probs_N) -> (Tensor, Tensor)");
  m.def("permute_weighted(Tensor x_TH, Tensor weights_TK, Tensor rows_TK, int num_rows) -> (Tensor, Tensor)");
  m.def("permute_weighted_backward(Tensor grad_NH, Tensor grad_N, Tensor rows_TK) -> (Tensor, Tensor)");
  m.def("chosen_experts(Tensor routing_map_TE, Tensor probs_TE, int top_k) -> (Tensor, Tensor)");
  m.def("chosen_experts_backward(Tensor grad_TK, Tensor ids_TK, int num_experts) -> Tensor");
  m.def("chunk_rows(Tensor counts_QS, int num_rows) -> (Tensor, Tensor)");
  m.def("zero_empty_groups(Tensor(a!) grad_SMK, Tensor ends_S) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smartmoe, CPU, m) {
  m.impl("digest_sum", TORCH_BOX(&smartmoe::cpu::digest_sum));
  m.impl("min_max_split", TORCH_BOX(&smartmoe::cpu::min_max_split));
  m.impl("exact_replicas", TORCH_BOX(&smartmoe::cpu::exact_replicas));
  m.impl("history_replicas", TORCH_BOX(&smartmoe::cpu::history_replicas));
  m.impl("swap_homes", TORCH_BOX(&smartmoe::cpu::swap_homes));
  m.impl("paying_replicas", TORCH_BOX(&smartmoe::cpu::paying_replicas));
  m.impl("exact_plan", TORCH_BOX(&smartmoe::cpu::exact_plan));
  m.impl("relay_tree", TORCH_BOX(&smartmoe::cpu::relay_tree));
  m.impl("relayed_flow", TORCH_BOX(&smartmoe::cpu::relayed_flow));
  m.impl("plan_dispatch", TORCH_BOX(&smartmoe::cpu::plan_dispatch));
  m.impl("exact_split", TORCH_BOX(&smartmoe::cpu::exact_split));
  m.impl("dispatch_map", TORCH_BOX(&smartmoe::cpu::dispatch_map));
  m.impl("permute", TORCH_BOX(&smartmoe::cpu::permute));
  m.impl("permute_joined", TORCH_BOX(&smartmoe::cpu::permute_joined));
  m.impl("permute_packed", TORCH_BOX(&smartmoe::cpu::permute_packed));
  m.impl("unpermute", TORCH_BOX(&smartmoe::cpu::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&smartmoe::cpu::unpermute_backward));
  m.impl("swiglu", TORCH_BOX(&smartmoe::cpu::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&smartmoe::cpu::swiglu_backward));
  m.impl("permute_weighted", TORCH_BOX(&smartmoe::cpu::permute_weighted));
  m.impl("permute_weighted_backward", TORCH_BOX(&smartmoe::cpu::permute_weighted_backward));
  m.impl("chosen_experts", TORCH_BOX(&smartmoe::cpu::chosen_experts));
  m.impl("chosen_experts_backward", TORCH_BOX(&smartmoe::cpu::chosen_experts_backward));
  m.impl("chunk_rows", TORCH_BOX(&smartmoe::cpu::chunk_rows));
  m.impl("zero_empty_groups", TORCH_BOX(&smartmoe::cpu::zero_empty_groups));
}

#ifdef SMARTMOE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(smartmoe, CUDA, m) {
  m.impl("exact_split", TORCH_BOX(&smartmoe::cuda::exact_split));
  m.impl("dispatch_map", TORCH_BOX(&smartmoe::cuda::dispatch_map));
  m.impl("permute", TORCH_BOX(&smartmoe::cuda::permute));
  m.impl("permute_joined", TORCH_BOX(&smartmoe::cuda::permute_joined));
  m.impl("permute_packed", TORCH_BOX(&smartmoe::cuda::permute_packed));
  m.impl("unpermute", TORCH_BOX(&smartmoe::cuda::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&smartmoe::cuda::unpermute_backward));
  m.impl("swiglu", TORCH_BOX(&smartmoe::cuda::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&smartmoe::cuda::swiglu_backward));
  m.impl("permute_weighted", TORCH_BOX(&smartmoe::cuda::permute_weighted));
  m.impl("permute_weighted_backward", TORCH_BOX(&smartmoe::cuda::permute_weighted_backward));
  m.impl("chosen_experts", TORCH_BOX(&smartmoe::cuda::chosen_experts));
  m.impl("chosen_experts_backward", TORCH_BOX(&smartmoe::cuda::chosen_experts_backward));
  m.impl("chunk_rows", TORCH_BOX(&smartmoe::cuda::chunk_rows));
  m.impl("zero_empty_groups", TORCH_BOX(&smartmoe::cuda::zero_empty_groups));
}
#endif
