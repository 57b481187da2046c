// Torch glue of permute: checks, output and scratch; the kernels are in permute.cu.
#include "permute.h"

#include <torch/csrc/stable/ops.h>

#include "../dispatch_checks.h"
#include "../ops.h"
#include "context.h"

namespace smartmoe::cuda {
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Context context(x_TH);
  const Tensor x = torch::stable::contiguous(x_TH), rows = torch::stable::contiguous(rows_TK);
  Tensor y_NH = torch::stable::new_empty(x, {num_rows, x.size(1)});
  Tensor choice_of_row = torch::stable::new_empty(rows, {num_rows});
  Context::check("permute", launch_permute(x.const_data_ptr(), rows.const_data_ptr<int32_t>(), rows.size(0),
                                           static_cast<int>(rows.size(1)), y_NH.mutable_data_ptr(), num_rows,
                                           x.size(1) * static_cast<int64_t>(x.element_size()),
                                           choice_of_row.mutable_data_ptr<int32_t>(), context.launch()));
  return y_NH;
}
}  // namespace smartmoe::cuda
