// Argument checks shared by the CPU kernels and the CUDA glue. The texts are those of megatron_smartmoe/ops/checks.py
// (a test compares them): an error must read the same whichever code serves the op.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace smartmoe {
using torch::headeronly::ScalarType;

// A private histogram per block has to fit in shared memory beside enough other blocks: 4096 counters are 16 KiB.
constexpr int64_t kMaxExperts = 4096;
// A counting sort keeps 20 bytes per slot in shared memory: 40 KiB, which every GPU grants without asking.
constexpr int64_t kMaxSlots = 2048;
constexpr int64_t kMaxRows = 2147483647;  // rows are int32

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

inline void check_ids(const torch::stable::Tensor& ids, const char* name = "ids") {
  const ScalarType dtype = ids.scalar_type();
  if (dtype == ScalarType::Int || dtype == ScalarType::Long) return;
  fail(name, ".dtype = ", dtype_name(dtype), ": it must be int32 or int64. Convert it with ", name, ".long()");
}

inline void check_num_experts(int64_t num_experts) {
  if (num_experts >= 1 && num_experts <= kMaxExperts) return;
  fail("num_experts = ", num_experts, ": it must be in 1..", kMaxExperts,
       ". Pass the number of logical experts of the layer");
}

inline void check_int64(const char* name, const torch::stable::Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Long) return;
  fail(name, ".dtype = ", dtype_name(dtype), ": it must be int64. Convert it with ", name, ".long()");
}

// The shape as Python prints a list of its sizes.
inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_split(const torch::stable::Tensor& counts_RE, const torch::stable::Tensor& hosts_ER) {
  check_int64("counts_RE", counts_RE);
  if (hosts_ER.scalar_type() != ScalarType::Bool) {
    fail("hosts_ER.dtype = ", dtype_name(hosts_ER.scalar_type()), ": it must be bool. Convert it with hosts_ER.bool()");
  }
  if (counts_RE.dim() != 2 || counts_RE.size(0) < 1) {
    fail("counts_RE.shape = ", shape_text(counts_RE),
         ": it must be [R, E] with at least one rank. Pass the counts of one layer, a row per source rank");
  }
  const int64_t num_ranks = counts_RE.size(0), num_experts = counts_RE.size(1);
  if (hosts_ER.dim() == 2 && hosts_ER.size(0) == num_experts && hosts_ER.size(1) == num_ranks) return;
  fail("hosts_ER.shape = ", shape_text(hosts_ER), ": it must be [E, R] = [", num_experts, ", ", num_ranks,
       "], as counts_RE has it. Pass a row per expert");
}

inline void check_replicas(const torch::stable::Tensor& load_E, const torch::stable::Tensor& slots_RS,
                           int64_t home_slots, int64_t num_nodes) {
  check_int64("load_E", load_E);
  check_int64("slots_RS", slots_RS);
  if (load_E.dim() != 1) {
    fail("load_E.shape = ", shape_text(load_E), ": it must be [E]. Pass the sum of the counts over the source ranks");
  }
  if (slots_RS.dim() != 2 || slots_RS.size(0) < 1) {
    fail("slots_RS.shape = ", shape_text(slots_RS),
         ": it must be [R, S] with at least one rank. Pass the slots of one layer, a row per rank");
  }
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = load_E.size(0);
  // the product is small once home_slots is known to be at most S
  if (home_slots < 0 || home_slots > num_slots || home_slots * num_ranks != num_experts) {
    fail("home_slots = ", home_slots, ": it must be E / R = ", num_experts, " / ", num_ranks,
         ", and at most S = ", num_slots, ". Pass the number of homes of a rank");
  }
  if (num_nodes < 1 || num_ranks % num_nodes != 0) {
    fail("num_nodes = ", num_nodes, ": it must divide R = ", num_ranks, ". Pass the nodes that the ranks lie on");
  }
}
}  // namespace smartmoe
