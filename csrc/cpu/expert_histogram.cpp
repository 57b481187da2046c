// One pass over the ids on one thread: the CPU ranks of a job have one thread each, and the pass is bound by memory.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
namespace {
template <class Id>
void count(const Tensor& ids, int64_t num_experts, int64_t* counts_E) {
  const Id* id = ids.const_data_ptr<Id>();
  const int64_t num_ids = ids.numel();
  for (int64_t i = 0; i < num_ids; ++i) {
    // as unsigned, a negative id is larger than any expert: one comparison rejects both sides
    const uint64_t expert = static_cast<uint64_t>(static_cast<int64_t>(id[i]));
    if (expert < static_cast<uint64_t>(num_experts)) ++counts_E[expert];
  }
}
}  // namespace

Tensor expert_histogram(const Tensor& ids, int64_t num_experts) {
  check_ids(ids);
  check_num_experts(num_experts);
  const Tensor dense = torch::stable::contiguous(ids);
  Tensor counts_E = torch::stable::new_zeros(ids, {num_experts}, ScalarType::Long);
  int64_t* counts = counts_E.mutable_data_ptr<int64_t>();
  if (ids.scalar_type() == ScalarType::Long) {
    count<int64_t>(dense, num_experts, counts);
  } else {
    count<int32_t>(dense, num_experts, counts);
  }
  return counts_E;
}
}  // namespace smartmoe::cpu
