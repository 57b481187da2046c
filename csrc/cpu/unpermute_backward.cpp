// Both gradients of a weighted unpermute in one pass over the rows, one thread.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
// A dot product is kept in this many partial sums: a single one would have to be added in the order of the columns,
// which no compiler may turn into vector instructions.
constexpr int64_t kLanes = 16;

// Writes weight * grad to grad_y and returns the dot product of grad and y.
template <class T>
Sum<T> one_row(const T* grad, const T* y, Sum<T> weight, T* grad_y, int64_t hidden) {
  Sum<T> lanes[kLanes] = {};
  int64_t h = 0;
  for (; h + kLanes <= hidden; h += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const Sum<T> g = static_cast<Sum<T>>(grad[h + i]);
      lanes[i] += g * static_cast<Sum<T>>(y[h + i]);
      grad_y[h + i] = static_cast<T>(g * weight);
    }
  }
  for (int64_t i = 0; h < hidden; ++h, ++i) {
    const Sum<T> g = static_cast<Sum<T>>(grad[h]);
    lanes[i] += g * static_cast<Sum<T>>(y[h]);
    grad_y[h] = static_cast<T>(g * weight);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
void all_rows(const Tensor& grad, const Tensor& y, const Tensor& map, const Tensor& weights, Tensor& grad_y,
              std::vector<Sum<T>>& dots_TK) {
  const int64_t num_tokens = map.size(0), num_choices = map.size(1), num_rows = y.size(0), hidden = y.size(1);
  const int32_t* rows_TK = map.const_data_ptr<int32_t>();
  const std::vector<Sum<T>> weights_TK = read_weights<Sum<T>>(weights);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t j = t * num_choices; j < (t + 1) * num_choices; ++j) {
      if (!is_row(rows_TK[j], num_rows)) continue;
      const int64_t at = rows_TK[j] * hidden;
      const auto choice = static_cast<size_t>(j);
      dots_TK[choice] = one_row<T>(grad.const_data_ptr<T>() + t * hidden, y.const_data_ptr<T>() + at,
                                   weights_TK[choice], grad_y.mutable_data_ptr<T>() + at, hidden);
    }
  }
  zero_unnamed_rows(rows_TK, num_tokens * num_choices, static_cast<char*>(grad_y.mutable_data_ptr()), num_rows,
                    hidden * static_cast<int64_t>(sizeof(T)), hidden * static_cast<int64_t>(sizeof(T)));
}
}  // namespace

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_TH, const Tensor& y_NH, const Tensor& rows_TK,
                                              const Tensor& weights_TK) {
  check_unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK);
  const Tensor grad = torch::stable::contiguous(grad_TH), y = torch::stable::contiguous(y_NH);
  const Tensor map = torch::stable::contiguous(rows_TK), weights = torch::stable::contiguous(weights_TK);
  Tensor grad_y = torch::stable::new_empty(y, y.sizes()), grad_weights = torch::stable::new_empty(weights, map.sizes());
  with_float_type(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Sum<T>> dots_TK(static_cast<size_t>(map.numel()), Sum<T>{0});
    all_rows<T>(grad, y, map, weights, grad_y, dots_TK);
    with_float_type(weights.scalar_type(), [&](auto weight_zero) {
      using W = decltype(weight_zero);
      W* out = grad_weights.mutable_data_ptr<W>();
      for (size_t i = 0; i < dots_TK.size(); ++i) out[i] = static_cast<W>(dots_TK[i]);
    });
  });
  return {grad_y, grad_weights};
}
}  // namespace smartmoe::cpu
