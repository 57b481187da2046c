// SwiGLU times a row's probability, and its gradients, one thread. Everything is computed in the type of the sums and
// rounded once: a 16-bit activation is never rounded in between.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
template <class S>
S sigmoid(S x) {
  return S{1} / (S{1} + std::exp(-x));
}
}  // namespace

Tensor swiglu(const Tensor& inner_NG, const Tensor& probs_N) {
  check_swiglu(inner_NG, probs_N);
  const Tensor inner = torch::stable::contiguous(inner_NG);
  const int64_t num_rows = inner.size(0), ffn = inner.size(1) / 2;
  Tensor out_NF = torch::stable::new_empty(inner, {num_rows, ffn});
  with_float_type(inner.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto probs = read_weights<Sum<T>>(torch::stable::contiguous(probs_N));
    const T* gate = inner.const_data_ptr<T>();
    T* out = out_NF.mutable_data_ptr<T>();
    for (int64_t n = 0; n < num_rows; ++n, gate += 2 * ffn, out += ffn) {
      for (int64_t f = 0; f < ffn; ++f) {
        const auto g = static_cast<Sum<T>>(gate[f]), linear = static_cast<Sum<T>>(gate[ffn + f]);
        out[f] = static_cast<T>(g * sigmoid(g) * linear * probs[static_cast<size_t>(n)]);
      }
    }
  });
  return out_NF;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_NF, const Tensor& inner_NG, const Tensor& probs_N) {
  check_swiglu_backward(grad_NF, inner_NG, probs_N);
  const Tensor grad = torch::stable::contiguous(grad_NF), inner = torch::stable::contiguous(inner_NG);
  const int64_t num_rows = inner.size(0), ffn = inner.size(1) / 2;
  Tensor grad_inner = torch::stable::new_empty(inner, inner.sizes());
  Tensor grad_probs = torch::stable::new_empty(probs_N, probs_N.sizes());
  with_float_type(inner.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto probs = read_weights<Sum<T>>(torch::stable::contiguous(probs_N));
    const T *from = grad.const_data_ptr<T>(), *gate = inner.const_data_ptr<T>();
    T* to = grad_inner.mutable_data_ptr<T>();
    std::vector<Sum<T>> dots(static_cast<size_t>(num_rows));
    for (size_t n = 0; n < dots.size(); ++n, from += ffn, gate += 2 * ffn, to += 2 * ffn) {
      for (int64_t f = 0; f < ffn; ++f) {
        const auto d = static_cast<Sum<T>>(from[f]), g = static_cast<Sum<T>>(gate[f]);
        const auto linear = static_cast<Sum<T>>(gate[ffn + f]);
        const Sum<T> s = sigmoid(g), silu = g * s, scaled = d * probs[n];
        to[f] = static_cast<T>(scaled * linear * (s * (1 + g * (1 - s))));
        to[ffn + f] = static_cast<T>(scaled * silu);
        dots[n] += d * (silu * linear);
      }
    }
    with_float_type(probs_N.scalar_type(), [&](auto prob_zero) {
      using P = decltype(prob_zero);
      P* out = grad_probs.mutable_data_ptr<P>();
      for (size_t n = 0; n < dots.size(); ++n) out[n] = static_cast<P>(dots[n]);
    });
  });
  return {grad_inner, grad_probs};
}
}  // namespace smartmoe::cpu
