// Copies of whole rows, one thread: a token's row stays in the cache while it is written K_top times.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
// The rows of a result that lie a pitch apart, all in bytes.
struct Target {
  char* data;
  int64_t num_rows, pitch, row_bytes;
};

// What token t has, from t * from_pitch on, goes to each of its rows; or, per choice, each choice's own value.
void copy_rows(const Tensor& map, int64_t first_token, int64_t num_tokens, const char* from, int64_t from_pitch,
               bool per_choice, const Target& to) {
  const int64_t num_choices = map.size(1);
  const int32_t* rows = map.const_data_ptr<int32_t>() + first_token * num_choices;
  if (to.row_bytes == 0) return;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t j = 0; j < num_choices; ++j) {
      const int32_t row = rows[t * num_choices + j];
      if (!is_row(row, to.num_rows)) continue;
      const char* value = from + t * from_pitch + (per_choice ? j * to.row_bytes : 0);
      std::memcpy(to.data + row * to.pitch, value, static_cast<size_t>(to.row_bytes));
    }
  }
}

// The rows of a block of tokens, and their weights if there are any, to their places.
void copy_block(const Tensor& map, int64_t first_token, const Tensor& x_TH, const Target& y,
                const std::optional<Tensor>& weights_TK, const Target& weights_N) {
  const Tensor x = dense_rows(x_TH);
  copy_rows(map, first_token, x.size(0), static_cast<const char*>(x.const_data_ptr()), row_pitch_bytes(x), false, y);
  if (!weights_TK) return;
  const Tensor weights = dense_rows(*weights_TK);
  copy_rows(map, first_token, x.size(0), static_cast<const char*>(weights.const_data_ptr()), row_pitch_bytes(weights),
            true, weights_N);
}

void zero_unnamed(const Tensor& map, const Target& to) {
  zero_unnamed_rows(map.const_data_ptr<int32_t>(), map.numel(), to.data, to.num_rows, to.pitch, to.row_bytes);
}

// Dense rows of a tensor [N, ...].
Target target_of(Tensor& tensor, int64_t row_bytes) {
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.size(0), row_bytes, row_bytes};
}

int64_t bytes_of_row(const Tensor& x_TH) {
  return x_TH.size(1) * static_cast<int64_t>(x_TH.element_size());
}
}  // namespace

Tensor permute(const Tensor& x_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  const Tensor map = torch::stable::contiguous(rows_TK);
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  const Target y = target_of(y_NH, bytes_of_row(x_TH));
  copy_block(map, 0, x_TH, y, std::nullopt, {});
  zero_unnamed(map, y);
  return y_NH;
}

Tensor permute_joined(const Tensor& x_TH, const Tensor& more_TH, const Tensor& rows_TK, int64_t num_rows) {
  check_permute_joined(x_TH, more_TH, rows_TK, num_rows);
  const Tensor map = torch::stable::contiguous(rows_TK);
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  const Target y = target_of(y_NH, bytes_of_row(x_TH));
  copy_block(map, 0, x_TH, y, std::nullopt, {});
  copy_block(map, x_TH.size(0), more_TH, y, std::nullopt, {});
  zero_unnamed(map, y);
  return y_NH;
}

Tensor permute_packed(const Tensor& x_TH, const Tensor& weights_TK, const std::optional<Tensor>& more_TH,
                      const std::optional<Tensor>& more_weights_TK, const Tensor& rows_TK, int64_t num_rows) {
  check_permute_packed(x_TH, weights_TK, more_TH, more_weights_TK, rows_TK, num_rows);
  const PackedRow packed(x_TH, weights_TK);
  const Tensor map = torch::stable::contiguous(rows_TK);
  Tensor y_NP = torch::stable::new_empty(x_TH, {num_rows, packed.elements});
  if (num_rows == 0) return y_NP;
  char* data = static_cast<char*>(y_NP.mutable_data_ptr());
  const Target y{data, num_rows, packed.bytes, bytes_of_row(x_TH)};
  const Target weights{data + packed.weight_at, num_rows, packed.bytes,
                       static_cast<int64_t>(weights_TK.element_size())};
  copy_block(map, 0, x_TH, y, weights_TK, weights);
  if (more_TH) copy_block(map, x_TH.size(0), *more_TH, y, more_weights_TK, weights);
  zero_unnamed(map, y);
  zero_unnamed(map, weights);
  return y_NP;
}

std::tuple<Tensor, Tensor> permute_weighted(const Tensor& x_TH, const Tensor& weights_TK, const Tensor& rows_TK,
                                            int64_t num_rows) {
  check_permute_weighted(x_TH, weights_TK, rows_TK, num_rows);
  const Tensor map = torch::stable::contiguous(rows_TK);
  Tensor weights_N = torch::stable::new_empty(weights_TK, {num_rows});
  Tensor y_NH = torch::stable::new_empty(x_TH, {num_rows, x_TH.size(1)});
  const Target y = target_of(y_NH, bytes_of_row(x_TH));
  const Target weights = target_of(weights_N, static_cast<int64_t>(weights_TK.element_size()));
  copy_block(map, 0, x_TH, y, weights_TK, weights);
  zero_unnamed(map, y);
  zero_unnamed(map, weights);
  return {y_NH, weights_N};
}

std::tuple<Tensor, Tensor> permute_weighted_backward(const Tensor& grad_NH, const Tensor& grad_N,
                                                     const Tensor& rows_TK) {
  check_permute_weighted_backward(grad_NH, grad_N, rows_TK);
  const Tensor map = torch::stable::contiguous(rows_TK);
  Tensor grad_TK = torch::stable::new_zeros(grad_N, map.sizes());
  const size_t bytes = static_cast<size_t>(grad_N.element_size()),
               pitch = static_cast<size_t>(grad_N.stride(0)) * bytes;
  const int32_t* rows = map.const_data_ptr<int32_t>();
  const auto* from = static_cast<const char*>(grad_N.const_data_ptr());
  auto* to = static_cast<char*>(grad_TK.mutable_data_ptr());
  for (int64_t i = 0; i < map.numel(); ++i) {
    if (!is_row(rows[i], grad_N.size(0))) continue;
    std::memcpy(to + static_cast<size_t>(i) * bytes, from + static_cast<size_t>(rows[i]) * pitch, bytes);
  }
  return {unpermute(grad_NH, map, std::nullopt), grad_TK};
}
}  // namespace smartmoe::cpu
