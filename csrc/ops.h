// The ops as functions, one namespace per dispatch key: what csrc/ops.cpp registers. Shapes are documented with the
// public functions in megatron_smartmoe/ops/__init__.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace smartmoe {
using torch::stable::Tensor;

namespace cpu {
Tensor expert_histogram(const Tensor& ids, int64_t num_experts);
}

namespace cuda {
Tensor expert_histogram(const Tensor& ids, int64_t num_experts);
}
}  // namespace smartmoe
