// Copies of whole rows, one thread: a token's row stays in the cache while it is written K_top times.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Tensor x = torch::stable::contiguous(x_TH), map = torch::stable::contiguous(rows_TK);
  const int64_t num_tokens = map.size(0), num_choices = map.size(1);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor y_NH = torch::stable::new_empty(x, {num_rows, x.size(1)});
  const int32_t* rows = map.const_data_ptr<int32_t>();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y_NH.mutable_data_ptr());
  if (row_bytes == 0) return y_NH;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t j = 0; j < num_choices; ++j) {
      const int32_t row = rows[t * num_choices + j];
      if (is_row(row, num_rows))
        std::memcpy(to + row * row_bytes, from + t * row_bytes, static_cast<size_t>(row_bytes));
    }
  }
  zero_unnamed_rows(rows, num_tokens * num_choices, to, num_rows, row_bytes);
  return y_NH;
}
}  // namespace smartmoe::cpu
