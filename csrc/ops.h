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
Tensor exact_replicas(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes);
std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots);
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK);
}  // namespace cpu

namespace cuda {
std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots);
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows);
Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK);
}  // namespace cuda
}  // namespace smartmoe
