// Both gradients of a weighted unpermute on the GPU, bound by memory: (1 + 2 K) rows of traffic per token.
//
// Method: a block per token. A thread holds a piece of the token's gradient and, for each of the K choices, reads the
// piece of the row, adds to that choice's dot product and writes the piece of the row's gradient. The dot products are
// reduced in a fixed order: by shuffles in a warp, then over the warps in shared memory.
// Alternative: a kernel for each gradient, which reads the token's gradient and the rows' addresses twice.
#include "floats.cuh"

namespace smartmoe::cuda {
namespace {
constexpr unsigned kThreads = 128;
constexpr int kWarps = static_cast<int>(kThreads) / kWarpSize;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// The columns of this thread: writes the gradients of the named rows, adds to their dot products.
template <class T, int kWidth, int kStep>
__device__ __forceinline__ void scale_and_dot(const UnpermuteBackwardArgs& args, int64_t token,
                                              const int32_t (&row)[kStep], const float (&weight)[kStep],
                                              float (&dot)[kStep]) {
  using Piece = Vector<T, kWidth>;
  const int64_t vectors = args.hidden / kWidth;
  const Piece* grad = static_cast<const Piece*>(args.grad_TH) + token * vectors;
  for (int64_t c = threadIdx.x; c < vectors; c += blockDim.x) {
    Piece chosen[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      if (row[j] >= 0) chosen[j] = load_once(static_cast<const Piece*>(args.y_NH) + row[j] * vectors + c);
    }
    const Piece piece = grad[c];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      if (row[j] < 0) continue;
      float scaled[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float g = to_float(piece.element[i]);
        dot[j] += g * to_float(chosen[j].element[i]);
        scaled[i] = g * weight[j];
      }
      store(static_cast<Piece*>(args.grad_y_NH) + row[j] * vectors + c, scaled);
    }
  }
}

// K is the number of choices, 0 for any.
template <class T, int kWidth, int K>
__global__ void __launch_bounds__(kThreads) both_gradients(UnpermuteBackwardArgs args) {
  constexpr int kStep = K > 0 ? K : 4;
  SMARTMOE_SHARED(float, partial, [kWarps][kStep]);
  const int64_t token = blockIdx.x;
  const int num_choices = K > 0 ? K : args.num_choices, thread = static_cast<int>(threadIdx.x);
  const int32_t* token_rows = args.rows_TK + token * num_choices;
  for (int j0 = 0; j0 < num_choices; j0 += kStep) {
    int32_t row[kStep];
    float weight[kStep], dot[kStep];
    load_rows<kStep, (K > 0)>(token_rows, j0, num_choices, args.num_rows, row);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      weight[j] = row[j] >= 0 ? load_any(args.weights_TK, args.weight_type, token * num_choices + j0 + j) : 0.0f;
      dot[j] = 0.0f;
    }
    scale_and_dot<T, kWidth, kStep>(args, token, row, weight, dot);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const float sum = warp_sum(dot[j]);
      if (lane_id() == 0) partial[warp_id()][j] = sum;
    }
    __syncthreads();
    if (thread < kStep && j0 + thread < num_choices) {
      float sum = 0.0f;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) sum += partial[warp][thread];
      store_any(args.grad_weights_TK, args.weight_type, token * num_choices + j0 + thread, sum);
    }
    __syncthreads();  // partial is used again
  }
  note_choices(token_rows, token * num_choices, num_choices, args.num_rows, args.choice_of_row);
}

template <class T, int kWidth, int K>
LaunchError launch(const UnpermuteBackwardArgs& args, const Stream& stream) {
  const unsigned threads = threads_for(args.hidden / kWidth, 1, kThreads);
  SMARTMOE_LAUNCH((both_gradients<T, kWidth, K>), dim3(static_cast<unsigned>(args.num_tokens)), dim3(threads), 0,
                  stream.handle, args);
  return last_launch_error();
}

// Vectors of 16 bytes where rows and pointers are multiples of that, else single elements.
template <class T>
LaunchError launch_widest(const UnpermuteBackwardArgs& args, const Stream& stream) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  const bool aligned = is_aligned(args.grad_TH, kVectorBytes) && is_aligned(args.y_NH, kVectorBytes) &&
                       is_aligned(args.grad_y_NH, kVectorBytes);
  if (args.hidden % kWidth != 0 || !aligned) return launch<T, 1, 0>(args, stream);
  LaunchError error = nullptr;
  with_choices(args.num_choices, args.rows_TK,
               [&](auto k) { error = launch<T, kWidth, decltype(k)::value>(args, stream); });
  return error;
}
}  // namespace

LaunchError launch_unpermute_backward(const UnpermuteBackwardArgs& args, const Stream& stream) {
  LaunchError error = set_device(stream);
  if (error != nullptr) return error;
  int64_t element_bytes = 0;
  with_float_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    element_bytes = sizeof(T);
    // no early return for H = 0 or N = 0: grad_weights_TK has to be written
    if (args.num_tokens > 0 && args.num_choices > 0) error = launch_widest<T>(args, stream);
  });
  if (error != nullptr) return error;
  const ZeroUnnamedRowsArgs unnamed{
      .rows_TK = args.rows_TK,
      .num_choices = args.num_tokens * args.num_choices,
      .choice_of_row = args.choice_of_row,
      .y_NH = args.grad_y_NH,
      .y_pitch = args.hidden * element_bytes,
      .num_rows = args.num_rows,
      .row_bytes = args.hidden * element_bytes,
      .weights_N = nullptr,
      .weights_pitch = 0,
      .weight_bytes = 0,
  };
  return launch_zero_unnamed_rows(unnamed, stream);
}
}  // namespace smartmoe::cuda
