// Both gradients of a weighted unpermute on the GPU, bound by memory: (1 + 2 K) rows of traffic per token.
//
// Method: a block per token. A thread holds a piece of the token's gradient and, for each of the K choices, reads the
// piece of the row, adds to that choice's dot product and writes the piece of the row's gradient. The dot products are
// reduced in a fixed order: by shuffles in a warp, then over the warps in shared memory.
// Alternative: a kernel for each gradient, which reads the token's gradient and the rows' addresses twice.
#include "floats.h"
#include "unpermute_backward.h"
#include "zero_rows.h"

namespace smartmoe::cuda {
namespace {
constexpr unsigned kThreads = 128;
constexpr int kWarps = static_cast<int>(kThreads) / kWarpSize;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

template <class T>
struct Arguments {
  const void *grad, *y;
  int64_t num_rows;
  const int32_t* rows_TK;
  const void* weights;
  FloatType weight_type;
  int64_t num_tokens;
  int num_choices;
  void *grad_y, *grad_weights;
  int64_t hidden;
  int32_t* choice_of_row;
};

// The columns of this thread: writes the gradients of the named rows, adds to their dot products.
template <class T, int kWidth, int kStep>
__device__ __forceinline__ void scale_and_dot(const Arguments<T>& a, int64_t token, const int32_t (&row)[kStep],
                                              const float (&weight)[kStep], float (&dot)[kStep]) {
  using Piece = Vector<T, kWidth>;
  const int64_t vectors = a.hidden / kWidth;
  const Piece* grad = static_cast<const Piece*>(a.grad) + token * vectors;
  for (int64_t c = threadIdx.x; c < vectors; c += blockDim.x) {
    Piece chosen[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      if (row[j] >= 0) chosen[j] = load_once(static_cast<const Piece*>(a.y) + row[j] * vectors + c);
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
      store(static_cast<Piece*>(a.grad_y) + row[j] * vectors + c, scaled);
    }
  }
}

// K is the number of choices, 0 for any.
template <class T, int kWidth, int K>
__global__ void __launch_bounds__(kThreads) both_gradients(Arguments<T> a) {
  constexpr int kStep = K > 0 ? K : 4;
  SMARTMOE_SHARED(float, partial, [kWarps][kStep]);
  const int64_t token = blockIdx.x;
  const int num_choices = K > 0 ? K : a.num_choices, thread = static_cast<int>(threadIdx.x);
  const int32_t* token_rows = a.rows_TK + token * num_choices;
  for (int j0 = 0; j0 < num_choices; j0 += kStep) {
    int32_t row[kStep];
    float weight[kStep], dot[kStep];
    load_rows<kStep, (K > 0)>(token_rows, j0, num_choices, a.num_rows, row);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      weight[j] = row[j] >= 0 ? load_any(a.weights, a.weight_type, token * num_choices + j0 + j) : 0.0f;
      dot[j] = 0.0f;
    }
    scale_and_dot<T, kWidth, kStep>(a, token, row, weight, dot);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const float sum = warp_sum(dot[j]);
      if (lane_id() == 0) partial[warp_id()][j] = sum;
    }
    __syncthreads();
    if (thread < kStep && j0 + thread < num_choices) {
      float sum = 0.0f;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) sum += partial[warp][thread];
      store_any(a.grad_weights, a.weight_type, token * num_choices + j0 + thread, sum);
    }
    __syncthreads();  // partial is used again
  }
  note_choices(token_rows, token * num_choices, num_choices, a.num_rows, a.choice_of_row);
}

template <class T, int kWidth, int K>
LaunchError launch(const Arguments<T>& a, const Launch& where) {
  const unsigned threads = threads_for(a.hidden / kWidth, 1, kThreads);
  SMARTMOE_LAUNCH((both_gradients<T, kWidth, K>), dim3(static_cast<unsigned>(a.num_tokens)), dim3(threads), 0,
                  where.stream, a);
  return leave();
}

// Vectors of 16 bytes where rows and pointers are multiples of that, else single elements.
template <class T>
LaunchError launch_widest(const Arguments<T>& a, const Launch& where) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  const bool aligned =
      is_aligned(a.grad, kVectorBytes) && is_aligned(a.y, kVectorBytes) && is_aligned(a.grad_y, kVectorBytes);
  if (a.hidden % kWidth != 0 || !aligned) return launch<T, 1, 0>(a, where);
  LaunchError error = nullptr;
  with_choices(a.num_choices, a.rows_TK, [&](auto k) { error = launch<T, kWidth, decltype(k)::value>(a, where); });
  return error;
}
}  // namespace

LaunchError launch_unpermute_backward(const void* grad, const void* y, FloatType type, int64_t num_rows,
                                      const int32_t* rows_TK, const void* weights, FloatType weight_type,
                                      int64_t num_tokens, int num_choices, void* grad_y, void* grad_weights,
                                      int64_t hidden, int32_t* choice_of_row, const Launch& where) {
  LaunchError error = enter(where);
  if (error != nullptr) return error;
  int64_t element_bytes = 0;
  with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    element_bytes = sizeof(T);
    // no early return for H = 0 or N = 0: grad_weights has to be written
    if (num_tokens > 0 && num_choices > 0)
      error = launch_widest<T>({grad, y, num_rows, rows_TK, weights, weight_type, num_tokens, num_choices, grad_y,
                                grad_weights, hidden, choice_of_row},
                               where);
  });
  if (error != nullptr) return error;
  return launch_zero_unnamed_rows(rows_TK, num_tokens * num_choices, choice_of_row, grad_y, num_rows,
                                  hidden * element_bytes, where);
}
}  // namespace smartmoe::cuda
