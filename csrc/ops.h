// The ops as functions, one namespace per dispatch key: what csrc/ops.cpp registers. Shapes are documented with the
// public functions in megatron_smartmoe/ops/__init__.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace smartmoe {
using torch::stable::Tensor;

namespace cpu {
Tensor expert_histogram(const Tensor& ids, int64_t num_experts);
Tensor min_max_split(const Tensor& counts_RE, const Tensor& hosts_ER);
Tensor exact_replicas(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes);
}  // namespace cpu

namespace cuda {
Tensor expert_histogram(const Tensor& ids, int64_t num_experts);
}
}  // namespace smartmoe
