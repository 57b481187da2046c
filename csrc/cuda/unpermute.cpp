// Torch glue of unpermute: checks and output; the kernels are in unpermute.cu.
#include "unpermute.h"

#include <torch/csrc/stable/ops.h>

#include "../dispatch_checks.h"
#include "../ops.h"
#include "context.h"
#include "unpermute_glue.h"

namespace smartmoe::cuda {
Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  const FloatType type = float_type("y_NH", y_NH);
  const FloatType weight_type = weights_TK ? float_type("weights_TK", *weights_TK) : type;
  const Context context(y_NH);
  const Tensor y = torch::stable::contiguous(y_NH), rows = torch::stable::contiguous(rows_TK);
  const Tensor weights = weights_TK ? torch::stable::contiguous(*weights_TK) : rows;
  Tensor x_TH = torch::stable::new_empty(y, {rows.size(0), y.size(1)});
  Context::check("unpermute", launch_unpermute(y.const_data_ptr(), type, y.size(0), rows.const_data_ptr<int32_t>(),
                                               weights_TK ? weights.const_data_ptr() : nullptr, weight_type,
                                               rows.size(0), static_cast<int>(rows.size(1)), x_TH.mutable_data_ptr(),
                                               y.size(1), context.launch()));
  return x_TH;
}
}  // namespace smartmoe::cuda
