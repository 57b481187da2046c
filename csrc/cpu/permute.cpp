// Copies of whole rows, one thread: a token's row stays in the cache while it is written K_top times.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
// Token t's row, of row_bytes, goes to each of its rows; or, with stride 1, each choice's own value to its row.
void copy_rows(const Tensor& rows_TK, const char* from, bool per_choice, size_t row_bytes, char* to, int64_t num_rows) {
  const int64_t num_tokens = rows_TK.size(0), num_choices = rows_TK.size(1);
  const int32_t* rows = rows_TK.const_data_ptr<int32_t>();
  if (row_bytes == 0) return;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t j = 0; j < num_choices; ++j) {
      const int64_t choice = t * num_choices + j;
      if (!is_row(rows[choice], num_rows)) continue;
      const char* row = from + static_cast<size_t>(per_choice ? choice : t) * row_bytes;
      std::memcpy(to + static_cast<size_t>(rows[choice]) * row_bytes, row, row_bytes);
    }
  }
  zero_unnamed_rows(rows, num_tokens * num_choices, to, num_rows, static_cast<int64_t>(row_bytes));
}
}  // namespace

Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Tensor x = torch::stable::contiguous(x_TH), map = torch::stable::contiguous(rows_TK);
  Tensor y_NH = torch::stable::new_empty(x, {num_rows, x.size(1)});
  const size_t row_bytes = static_cast<size_t>(x.size(1)) * static_cast<size_t>(x.element_size());
  copy_rows(map, static_cast<const char*>(x.const_data_ptr()), false, row_bytes,
            static_cast<char*>(y_NH.mutable_data_ptr()), num_rows);
  return y_NH;
}

std::tuple<Tensor, Tensor> permute_weighted(const Tensor& x_TH, const Tensor& weights_TK, const Tensor& rows_TK,
                                            int64_t num_rows) {
  check_permute_weighted(x_TH, weights_TK, rows_TK, num_rows);
  const Tensor map = torch::stable::contiguous(rows_TK), weights = torch::stable::contiguous(weights_TK);
  Tensor weights_N = torch::stable::new_empty(weights, {num_rows});
  copy_rows(map, static_cast<const char*>(weights.const_data_ptr()), true, static_cast<size_t>(weights.element_size()),
            static_cast<char*>(weights_N.mutable_data_ptr()), num_rows);
  return {permute(x_TH, map, num_rows), weights_N};
}

std::tuple<Tensor, Tensor> permute_weighted_backward(const Tensor& grad_NH, const Tensor& grad_N,
                                                     const Tensor& rows_TK) {
  check_permute_weighted_backward(grad_NH, grad_N, rows_TK);
  const Tensor map = torch::stable::contiguous(rows_TK), grads = torch::stable::contiguous(grad_N);
  Tensor grad_TK = torch::stable::new_zeros(grads, map.sizes());
  const size_t bytes = static_cast<size_t>(grads.element_size());
  const int32_t* rows = map.const_data_ptr<int32_t>();
  const auto* from = static_cast<const char*>(grads.const_data_ptr());
  auto* to = static_cast<char*>(grad_TK.mutable_data_ptr());
  for (int64_t i = 0; i < map.numel(); ++i) {
    if (!is_row(rows[i], grads.size(0))) continue;
    std::memcpy(to + static_cast<size_t>(i) * bytes, from + static_cast<size_t>(rows[i]) * bytes, bytes);
  }
  return {unpermute(grad_NH, map, std::nullopt), grad_TK};
}
}  // namespace smartmoe::cpu
