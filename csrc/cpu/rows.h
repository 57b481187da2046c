// What the CPU ops share: a division that rounds up, element types, and the rows that no choice names.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../checks.h"

namespace smartmoe::cpu {
// tokens / num_ranks, rounded up: the smallest level that num_ranks ranks can hold `tokens` at. Neither number is
// negative. Not (tokens + num_ranks - 1) / num_ranks, which may overflow.
inline int64_t ceil_div(int64_t tokens, int64_t num_ranks) {
  return tokens / num_ranks + (tokens % num_ranks != 0);
}

// Sums are made in this type.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a zero of the element type. The dtype has been checked.
template <class F>
void with_float_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Double: return f(double{});
    default: return f(float{});
  }
}

// The weights in the type that sums are made in.
template <class S>
std::vector<S> read_weights(const torch::stable::Tensor& weights_TK) {
  std::vector<S> weights(static_cast<size_t>(weights_TK.numel()));
  with_float_type(weights_TK.scalar_type(), [&](auto zero) {
    const auto* weight = weights_TK.const_data_ptr<decltype(zero)>();
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<S>(weight[i]);
  });
  return weights;
}

// Whether a choice names one of num_rows rows; as unsigned, -1 is larger than any.
inline bool is_row(int32_t row, int64_t num_rows) {
  return static_cast<uint64_t>(static_cast<int64_t>(row)) < static_cast<uint64_t>(num_rows);
}

// Clears the rows of y, a pitch apart, that no choice names. Clearing all of y beforehand would write every other row
// twice.
inline void zero_unnamed_rows(const int32_t* rows, int64_t num_choices, char* y, int64_t num_rows, int64_t pitch,
                              int64_t row_bytes) {
  if (row_bytes == 0) return;  // y may be null then, which memset must not be given
  std::vector<bool> named(static_cast<size_t>(num_rows), false);
  for (int64_t i = 0; i < num_choices; ++i) {
    if (is_row(rows[i], num_rows)) named[static_cast<size_t>(rows[i])] = true;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!named[static_cast<size_t>(row)]) std::memset(y + row * pitch, 0, static_cast<size_t>(row_bytes));
  }
}
}  // namespace smartmoe::cpu
