// Argument checks shared by the CPU kernels and the CUDA glue. The texts are those of megatron_smartmoe/ops/checks.py
// (a test compares them): an error must read the same whichever code serves the op.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace smartmoe {
using torch::headeronly::ScalarType;

// A private histogram per block has to fit in shared memory beside enough other blocks: 4096 counters are 16 KiB.
constexpr int64_t kMaxExperts = 4096;

// Throws the parts joined as one message. std::runtime_error is the one exception that torch's stable ABI turns into a
// Python error; STD_TORCH_CHECK throws the same, with a source path in front that tells a user nothing.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The dtype as Python spells it.
inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(dtype);
  }
}

inline void check_ids(const torch::stable::Tensor& ids) {
  const ScalarType dtype = ids.scalar_type();
  if (dtype == ScalarType::Int || dtype == ScalarType::Long) return;
  fail("ids.dtype = ", dtype_name(dtype), ": it must be int32 or int64. Convert it with ids.long()");
}

inline void check_num_experts(int64_t num_experts) {
  if (num_experts >= 1 && num_experts <= kMaxExperts) return;
  fail("num_experts = ", num_experts, ": it must be in 1..", kMaxExperts,
       ". Pass the number of logical experts of the layer");
}
}  // namespace smartmoe
