// The ops as functions, one namespace per dispatch key: what csrc/ops.cpp registers. Shapes are documented with the
// public functions in megatron_smartmoe/ops/__init__.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace smartmoe {
using torch::stable::Tensor;

namespace cpu {
int64_t digest_sum(const Tensor& bits_N, const Tensor& positions_L, int64_t width, int64_t value_factor);
Tensor min_max_split(const Tensor& counts_RE, const Tensor& hosts_ER);
Tensor exact_replicas(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes,
                      int64_t trials);
std::tuple<Tensor, Tensor> exact_split(const Tensor& counts_RE, int64_t spare_slots, int64_t num_nodes);
std::tuple<Tensor, Tensor, Tensor> history_replicas(const Tensor& slots_RS, const Tensor& loads_KE, int64_t home_slots,
                                                    int64_t num_nodes, bool many, int64_t max_steps,
                                                    int64_t max_experts, int64_t max_slots, int64_t trials,
                                                    double good_enough, double worst_weight, double replica_price,
                                                    double change_price, double min_gain, double enough);
std::tuple<Tensor, Tensor, Tensor> swap_homes(const Tensor& slots_RS, const Tensor& loads_KE, int64_t home_slots,
                                              int64_t num_nodes, int64_t max_steps, int64_t max_experts,
                                              int64_t max_slots, int64_t trials, double worst_weight,
                                              double replica_price, double change_price, double home_price,
                                              double min_gain, double enough);
Tensor paying_replicas(const Tensor& loads_KE, const Tensor& slots_RS, int64_t home_slots, const Tensor& price_23,
                       int64_t num_nodes);
std::tuple<Tensor, int64_t> exact_plan(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots,
                                       int64_t scope_nodes, bool or_group, double limit, const Tensor& price_23,
                                       int64_t num_nodes);
Tensor relay_tree(const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes);
std::tuple<Tensor, Tensor, Tensor> relayed_flow(const Tensor& counts_RE, const Tensor& slots_RS, int64_t home_slots,
                                                int64_t num_nodes, const std::optional<Tensor>& kept_RS);
void plan_dispatch(const Tensor& counts_RPE, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes,
                   int64_t rank, int64_t tp_rank, std::optional<int64_t> used_slots, int64_t scope_nodes, bool or_group,
                   double limit, const Tensor& price_23, const Tensor& plan);
std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots);
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor permute_joined(const Tensor& x_TH, const Tensor& more_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor permute_packed(const Tensor& x_TH, const Tensor& weights_TK, const std::optional<Tensor>& more_TH,
                      const std::optional<Tensor>& more_weights_TK, const Tensor& rows_TK, int64_t num_rows);
Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK);
Tensor swiglu(const Tensor& inner_NG, const Tensor& probs_N);
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_NF, const Tensor& inner_NG, const Tensor& probs_N);
void zero_empty_groups(const Tensor& grad_SMK, const Tensor& ends_S);
std::tuple<Tensor, Tensor> permute_weighted(const Tensor& x_TH, const Tensor& weights_TK, const Tensor& rows_TK,
                                            int64_t num_rows);
std::tuple<Tensor, Tensor> permute_weighted_backward(const Tensor& grad_NH, const Tensor& grad_N,
                                                     const Tensor& rows_TK);
std::tuple<Tensor, Tensor> chosen_experts(const Tensor& routing_map_TE, const Tensor& probs_TE, int64_t top_k);
Tensor chosen_experts_backward(const Tensor& grad_TK, const Tensor& ids_TK, int64_t num_experts);
std::tuple<Tensor, Tensor> chunk_rows(const Tensor& counts_QS, int64_t num_rows);
}  // namespace cpu

namespace cuda {
std::tuple<Tensor, Tensor> exact_split(const Tensor& counts_RE, int64_t spare_slots, int64_t num_nodes);
std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots);
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor permute_joined(const Tensor& x_TH, const Tensor& more_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor permute_packed(const Tensor& x_TH, const Tensor& weights_TK, const std::optional<Tensor>& more_TH,
                      const std::optional<Tensor>& more_weights_TK, const Tensor& rows_TK, int64_t num_rows);
Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK);
Tensor swiglu(const Tensor& inner_NG, const Tensor& probs_N);
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_NF, const Tensor& inner_NG, const Tensor& probs_N);
void zero_empty_groups(const Tensor& grad_SMK, const Tensor& ends_S);
std::tuple<Tensor, Tensor> permute_weighted(const Tensor& x_TH, const Tensor& weights_TK, const Tensor& rows_TK,
                                            int64_t num_rows);
std::tuple<Tensor, Tensor> permute_weighted_backward(const Tensor& grad_NH, const Tensor& grad_N,
                                                     const Tensor& rows_TK);
std::tuple<Tensor, Tensor> chosen_experts(const Tensor& routing_map_TE, const Tensor& probs_TE, int64_t top_k);
Tensor chosen_experts_backward(const Tensor& grad_TK, const Tensor& ids_TK, int64_t num_experts);
std::tuple<Tensor, Tensor> chunk_rows(const Tensor& counts_QS, int64_t num_rows);
}  // namespace cuda
}  // namespace smartmoe
