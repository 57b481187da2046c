// Weighted sum of a token's rows, one thread. A strip of columns is summed over all choices before the next, so that
// the sums stay in registers. Multiplication and addition are rounded apart (-ffp-contract=off), as torch does them:
// the twin gives the same bits.
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
constexpr int64_t kStrip = 64;     // columns: 64 floats are all 16 vector registers of any x86-64
constexpr size_t kLineBytes = 64;  // of a cache line

// Asks for the strip of a row that the next token will need: its address is random to the hardware.
template <class T>
void prefetch(const T* y_NH, int32_t row, int64_t num_rows, int64_t hidden, int64_t begin) {
  if (!is_row(row, num_rows)) return;
  const char* strip = reinterpret_cast<const char*>(y_NH + row * hidden + begin);
  for (size_t at = 0; at < kStrip * sizeof(T); at += kLineBytes) __builtin_prefetch(strip + at);
}

// One strip of a token: next_rows_K are the rows of the token after it, nullptr behind the last one; begin is its first
// column, size its columns, a constant where it can be one.
template <class T, class Size>
void sum_strip(const T* y_NH, int64_t num_rows, int64_t hidden, const int32_t* rows_K, const int32_t* next_rows_K,
               const Sum<T>* weights_K, int64_t num_choices, int64_t begin, Size size, T* x) {
  Sum<T> sums[kStrip] = {};
  for (int64_t j = 0; j < num_choices; ++j) {
    if (next_rows_K != nullptr) prefetch<T>(y_NH, next_rows_K[j], num_rows, hidden, begin);
    if (!is_row(rows_K[j], num_rows)) continue;
    const T* y = y_NH + rows_K[j] * hidden + begin;
    if (weights_K == nullptr) {
      for (int64_t h = 0; h < size; ++h) sums[h] += static_cast<Sum<T>>(y[h]);
    } else {
      const Sum<T> weight = weights_K[j];
      for (int64_t h = 0; h < size; ++h) sums[h] += weight * static_cast<Sum<T>>(y[h]);
    }
  }
  for (int64_t h = 0; h < size; ++h) x[begin + h] = static_cast<T>(sums[h]);
}

template <class T>
void sum_rows(const T* y_NH, int64_t num_rows, const Tensor& map, const Sum<T>* weights_TK, T* x_TH, int64_t hidden) {
  const int64_t num_tokens = map.size(0), num_choices = map.size(1);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t* rows = map.const_data_ptr<int32_t>() + t * num_choices;
    const Sum<T>* weights = weights_TK == nullptr ? nullptr : weights_TK + t * num_choices;
    const int32_t* next_rows = t + 1 < num_tokens ? rows + num_choices : nullptr;
    T* x = x_TH + t * hidden;
    int64_t begin = 0;
    for (; begin + kStrip <= hidden; begin += kStrip) {
      sum_strip<T>(y_NH, num_rows, hidden, rows, next_rows, weights, num_choices, begin,
                   std::integral_constant<int64_t, kStrip>{}, x);
    }
    if (begin < hidden) {
      sum_strip<T>(y_NH, num_rows, hidden, rows, next_rows, weights, num_choices, begin, hidden - begin, x);
    }
  }
}
}  // namespace

Tensor unpermute(const Tensor& y_NH, const Tensor& rows_TK, const std::optional<Tensor>& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  const Tensor y = torch::stable::contiguous(y_NH), map = torch::stable::contiguous(rows_TK);
  Tensor x_TH = torch::stable::new_empty(y, {map.size(0), y.size(1)});
  with_float_type(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Sum<T>> weights;
    if (weights_TK) weights = read_weights<Sum<T>>(torch::stable::contiguous(*weights_TK));
    sum_rows<T>(y.const_data_ptr<T>(), y.size(0), map, weights_TK ? weights.data() : nullptr,
                x_TH.mutable_data_ptr<T>(), y.size(1));
  });
  return x_TH;
}
}  // namespace smartmoe::cpu
