// SwiGLU times a row's probability on the GPU, forward and backward, bound by memory: 3 and 5 elements of traffic per
// output element.
//
// Method: a warp per row, with vectors of 16 bytes. The backward pass reads gate, linear part and gradient once, writes
// both their gradients, and reduces the probability's gradient by shuffles, in a fixed order. Everything between the
// load and the store is float32: an activation is rounded once.
// Alternative: a block per row, whose warps meet in shared memory. Rows are many and some 2,000 elements long: a warp
// each keeps every multiprocessor's memory pipeline full without a barrier.
#include <cmath>

#include "floats.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// The row of this warp; at or behind the last one there is nothing to do, for all of its lanes alike.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) activate(SwigluArgs args) {
  using Piece = Vector<T, kWidth>;
  const int64_t row = row_of_warp(), vectors = args.ffn / kWidth;
  if (row >= args.num_rows) return;
  const Piece* gates = static_cast<const Piece*>(args.inner_NG) + row * 2 * vectors;
  Piece* out = static_cast<Piece*>(args.out_NF) + row * vectors;
  const float prob = load_any(args.probs_N, args.prob_type, row);
  for (int64_t c = lane_id(); c < vectors; c += kWarpSize) {
    const Piece gate = gates[c], linear = gates[vectors + c];  // both are read again by the backward pass
    float result[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float g = to_float(gate.element[i]);
      result[i] = g * sigmoid(g) * to_float(linear.element[i]) * prob;
    }
    store(out + c, result);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) all_gradients(SwigluBackwardArgs args) {
  using Piece = Vector<T, kWidth>;
  const int64_t row = row_of_warp(), vectors = args.ffn / kWidth;
  if (row >= args.num_rows) return;
  const Piece* grads = static_cast<const Piece*>(args.grad_NF) + row * vectors;
  const Piece* gates = static_cast<const Piece*>(args.inner_NG) + row * 2 * vectors;
  Piece* out = static_cast<Piece*>(args.grad_inner_NG) + row * 2 * vectors;
  const float prob = load_any(args.probs_N, args.prob_type, row);
  float dot = 0.0f;
  for (int64_t c = lane_id(); c < vectors; c += kWarpSize) {
    const Piece grad = load_once(grads + c), gate = load_once(gates + c), linear = load_once(gates + vectors + c);
    float to_gate[kWidth], to_linear[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float d = to_float(grad.element[i]), g = to_float(gate.element[i]), l = to_float(linear.element[i]);
      const float s = sigmoid(g), silu = g * s, scaled = d * prob;
      to_gate[i] = scaled * l * (s * (1.0f + g * (1.0f - s)));
      to_linear[i] = scaled * silu;
      dot += d * (silu * l);
    }
    store(out + c, to_gate);
    store(out + vectors + c, to_linear);
  }
  const float sum = warp_sum(dot);
  if (lane_id() == 0) store_any(args.grad_probs_N, args.prob_type, row, sum);
}

dim3 blocks_for(int64_t num_rows) {
  return dim3(static_cast<unsigned>((num_rows + kWarps - 1) / kWarps));
}

// Calls f with the type and the width: vectors of 16 bytes where half rows and pointers are multiples of that.
template <class F>
void with_widest(FloatType type, int64_t ffn, bool aligned, F&& f) {
  with_float_type(type, [&](auto zero) {
    constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(zero));
    if (aligned && ffn % kWidth == 0) return f(zero, Constant<kWidth>{});
    return f(zero, Constant<1>{});
  });
}
}  // namespace

LaunchError launch_swiglu(const SwigluArgs& args, const Stream& stream) {
  if (args.num_rows == 0 || args.ffn == 0) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  const bool aligned = is_aligned(args.inner_NG, kVectorBytes) && is_aligned(args.out_NF, kVectorBytes);
  with_widest(args.type, args.ffn, aligned, [&](auto zero, auto width) {
    SMARTMOE_LAUNCH((activate<decltype(zero), decltype(width)::value>), blocks_for(args.num_rows), dim3(kThreads), 0,
                    stream.handle, args);
  });
  return last_launch_error();
}

LaunchError launch_swiglu_backward(const SwigluBackwardArgs& args, const Stream& stream) {
  if (args.num_rows == 0) return nullptr;  // with F = 0 the probabilities' gradient is still to be written
  if (const LaunchError error = set_device(stream)) return error;
  const bool aligned = is_aligned(args.grad_NF, kVectorBytes) && is_aligned(args.inner_NG, kVectorBytes) &&
                       is_aligned(args.grad_inner_NG, kVectorBytes);
  with_widest(args.type, args.ffn, aligned, [&](auto zero, auto width) {
    SMARTMOE_LAUNCH((all_gradients<decltype(zero), decltype(width)::value>), blocks_for(args.num_rows), dim3(kThreads),
                    0, stream.handle, args);
  });
  return last_launch_error();
}
}  // namespace smartmoe::cuda
