// Torch glue of the backward of unpermute: checks, outputs and scratch; the kernels are in unpermute_backward.cu.
#include "unpermute_backward.h"

#include <torch/csrc/stable/ops.h>

#include "../dispatch_checks.h"
#include "../ops.h"
#include "context.h"
#include "unpermute_glue.h"

namespace smartmoe::cuda {
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK) {
  check_unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK);
  const FloatType type = float_type("y_NH", y_NH), weight_type = float_type("weights_TK", weights_TK);
  const Context context(y_NH);
  const Tensor grad = torch::stable::contiguous(grad_TH), y = torch::stable::contiguous(y_NH);
  const Tensor rows = torch::stable::contiguous(rows_TK), weights = torch::stable::contiguous(weights_TK);
  Tensor grad_y = torch::stable::new_empty(y, y.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  Tensor choice_of_row = torch::stable::new_empty(rows, {y.size(0)});
  Context::check("unpermute_backward",
                 launch_unpermute_backward(grad.const_data_ptr(), y.const_data_ptr(), type, y.size(0),
                                           rows.const_data_ptr<int32_t>(), weights.const_data_ptr(), weight_type,
                                           rows.size(0), static_cast<int>(rows.size(1)), grad_y.mutable_data_ptr(),
                                           grad_weights.mutable_data_ptr(), y.size(1),
                                           choice_of_row.mutable_data_ptr<int32_t>(), context.launch()));
  return {grad_y, grad_weights};
}
}  // namespace smartmoe::cuda
