// What the torch glue of unpermute and of its backward share.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "float_type.h"

namespace smartmoe::cuda {
inline FloatType float_type(const char* name, const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Float: return FloatType::kFloat32;
    default:
      fail(name, ".dtype = ", dtype_name(tensor.scalar_type()),
           ": on a GPU it must be float16, bfloat16 or float32. Convert it with ", name, ".float()");
  }
}
}  // namespace smartmoe::cuda
