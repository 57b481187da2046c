// Clears the groups that have no rows, in place.
#include <cstring>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
void zero_empty_groups(const Tensor& grad_SMK, const Tensor& ends_S) {
  check_empty_groups(grad_SMK, ends_S);
  const int64_t num_groups = ends_S.size(0);
  if (grad_SMK.numel() == 0) return;  // there may be no memory then, which memset must not be given
  const int64_t group_bytes = grad_SMK.numel() / num_groups * static_cast<int64_t>(grad_SMK.element_size());
  const int32_t* ends = ends_S.const_data_ptr<int32_t>();
  char* grad = static_cast<char*>(grad_SMK.mutable_data_ptr());
  for (int64_t s = 0; s < num_groups; ++s) {
    const int32_t begin = s > 0 ? ends[s - 1] : 0;
    if (ends[s] == begin) std::memset(grad + s * group_bytes, 0, static_cast<size_t>(group_bytes));
  }
}
}  // namespace smartmoe::cpu
