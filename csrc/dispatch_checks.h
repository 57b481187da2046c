// Checks of the arguments of dispatch_map, permute, unpermute and its backward, as checks.h has them for the other ops:
// the order and the texts are those of megatron_smartmoe/ops/checks.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "checks.h"

namespace smartmoe {
inline std::string device_text(const torch::stable::Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, bool ok, const std::string& rule,
                        const char* way_out) {
  if (!ok) fail(name, ".shape = ", shape_text(tensor), ": it must be ", rule, ". ", way_out);
}

inline void check_device(const char* name, const torch::stable::Tensor& tensor, const char* other_name,
                         const torch::stable::Tensor& other) {
  const std::string device = device_text(tensor), expected = device_text(other);
  if (device == expected) return;
  fail(name, ".device = ", device, ": it must be ", expected, ", as ", other_name, " has it. Convert it with ", name,
       ".to(", other_name, ".device)");
}

inline void check_num_choices(const char* name, const torch::stable::Tensor& tensor) {
  if (tensor.numel() <= kMaxRows) return;
  fail(name, ".shape = ", shape_text(tensor), ": it must have at most ", kMaxRows, " choices. Split the micro-batch");
}

inline void check_dispatch_map(const torch::stable::Tensor& ids_TK, const torch::stable::Tensor& slot_of_E,
                               int64_t num_slots) {
  check_ids(ids_TK, "ids_TK");
  check_ids(slot_of_E, "slot_of_E");
  check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass a row of expert ids per token");
  check_num_choices("ids_TK", ids_TK);
  check_shape("slot_of_E", slot_of_E, slot_of_E.dim() == 1 && slot_of_E.numel() >= 1, "[E] with at least one expert",
              "Pass the slot of each logical expert");
  if (num_slots < 1 || num_slots > kMaxSlots) {
    fail("num_slots = ", num_slots, ": it must be in 1..", kMaxSlots,
         ". Pass the number of slots that slot_of_E points into");
  }
  check_device("slot_of_E", slot_of_E, "ids_TK", ids_TK);
}

// The map of dispatch_map, beside the rows or tokens `tensor` that it is used on.
inline void check_rows(const torch::stable::Tensor& rows_TK, const char* name, const torch::stable::Tensor& tensor) {
  if (rows_TK.scalar_type() != ScalarType::Int) {
    fail("rows_TK.dtype = ", dtype_name(rows_TK.scalar_type()),
         ": it must be int32. Pass the rows of dispatch_map, or convert it with rows_TK.int()");
  }
  check_shape("rows_TK", rows_TK, rows_TK.dim() == 2, "[T, K_top]", "Pass the rows of dispatch_map");
  check_num_choices("rows_TK", rows_TK);
  check_device("rows_TK", rows_TK, name, tensor);
}

inline void check_num_rows(int64_t num_rows) {
  if (num_rows >= 0 && num_rows <= kMaxRows) return;
  fail("num_rows = ", num_rows, ": it must be in 0..", kMaxRows,
       ". Pass the sum of dispatch_map's tokens_S, or any larger number");
}

inline void check_permute(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& rows_TK, int64_t num_rows) {
  check_shape("x_TH", x_TH, x_TH.dim() == 2, "[T, H]", "Pass a row per token");
  check_rows(rows_TK, "x_TH", x_TH);
  check_shape("rows_TK", rows_TK, rows_TK.size(0) == x_TH.size(0),
              "[T, K_top] with T = " + std::to_string(x_TH.size(0)) + ", as x_TH has it",
              "Pass the rows of the same tokens");
  check_num_rows(num_rows);
}

inline void check_unpermute(const torch::stable::Tensor& y_NH, const torch::stable::Tensor& rows_TK,
                            const std::optional<torch::stable::Tensor>& weights_TK) {
  const ScalarType dtype = y_NH.scalar_type();
  if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16 && dtype != ScalarType::Float &&
      dtype != ScalarType::Double) {
    fail("y_NH.dtype = ", dtype_name(dtype),
         ": it must be float16, bfloat16, float32 or float64. Convert it with y_NH.float()");
  }
  check_shape("y_NH", y_NH, y_NH.dim() == 2, "[N, H]", "Pass the permuted rows");
  check_num_rows(y_NH.size(0));
  check_rows(rows_TK, "y_NH", y_NH);
  if (!weights_TK) return;
  if (weights_TK->scalar_type() != ScalarType::Float && weights_TK->scalar_type() != dtype) {
    fail("weights_TK.dtype = ", dtype_name(weights_TK->scalar_type()), ": it must be float32, or ", dtype_name(dtype),
         " as y_NH is. Convert it with weights_TK.float()");
  }
  check_shape("weights_TK", *weights_TK, shape_text(*weights_TK) == shape_text(rows_TK),
              shape_text(rows_TK) + ", as rows_TK has it", "Pass a weight per choice");
  check_device("weights_TK", *weights_TK, "y_NH", y_NH);
}

inline void check_unpermute_backward(const torch::stable::Tensor& grad_TH, const torch::stable::Tensor& y_NH,
                                     const torch::stable::Tensor& rows_TK, const torch::stable::Tensor& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  if (grad_TH.scalar_type() != y_NH.scalar_type()) {
    fail("grad_TH.dtype = ", dtype_name(grad_TH.scalar_type()), ": it must be ", dtype_name(y_NH.scalar_type()),
         ", as y_NH is. Convert it with grad_TH.to(y_NH.dtype)");
  }
  const std::string expected = "[" + std::to_string(rows_TK.size(0)) + ", " + std::to_string(y_NH.size(1)) + "]";
  check_shape("grad_TH", grad_TH, shape_text(grad_TH) == expected,
              "[T, H] = " + expected + ", as rows_TK and y_NH have it", "Pass the gradient of unpermute's result");
  check_device("grad_TH", grad_TH, "y_NH", y_NH);
}
}  // namespace smartmoe
