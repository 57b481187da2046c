// Unpermute on the GPU, bound by memory: (K + 1) rows of traffic per token.
//
// Method: by token. A thread owns a few columns, has the loads of all K rows in flight before it uses the first, and
// adds them in float, in the order of the choices: no atomics, the same bits for every placement of the experts.
// Alternative: by row, adding into the token's sum with atomics. It reads and writes the sums K times, in an order that
// changes from run to run.
#include "floats.h"
#include "unpermute.h"

namespace smartmoe::cuda {
namespace {
constexpr unsigned kThreads = 256;

// Block (threads of a token, tokens). K is the number of choices, 0 for any; weights may be nullptr.
template <class T, int kWidth, int K>
__global__ void __launch_bounds__(kThreads)
    sum_rows(const Vector<T, kWidth>* __restrict__ y, int64_t num_rows, const int32_t* __restrict__ rows_TK,
             const void* __restrict__ weights, FloatType weight_type, int64_t num_tokens, int any_choices,
             Vector<T, kWidth>* __restrict__ x, int64_t vectors) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  const int num_choices = K > 0 ? K : any_choices;
  const int32_t* token_rows = rows_TK + token * num_choices;
  constexpr int kStep = K > 0 ? K : 4;
  int32_t row[kStep];
  if constexpr (K > 0) load_rows<K, true>(token_rows, 0, K, num_rows, row);
  for (int64_t c = threadIdx.x; c < vectors; c += blockDim.x) {
    float sum[kWidth] = {};
    for (int j0 = 0; j0 < num_choices; j0 += kStep) {
      if constexpr (K == 0) load_rows<kStep, false>(token_rows, j0, num_choices, num_rows, row);
      Vector<T, kWidth> chosen[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        if (row[j] >= 0) chosen[j] = load_once(y + row[j] * vectors + c);
      }
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        if (row[j] < 0) continue;
        const float weight = weights ? load_any(weights, weight_type, token * num_choices + j0 + j) : 1.0f;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += weight * to_float(chosen[j].element[i]);
      }
    }
    store(x + token * vectors + c, sum);
  }
}

struct Arguments {
  const void* y;
  int64_t num_rows;
  const int32_t* rows_TK;
  const void* weights;
  FloatType weight_type;
  int64_t num_tokens;
  int num_choices;
  void* x;
  int64_t hidden;
};

template <class T, int kWidth, int K>
LaunchError launch(const Arguments& a, const Launch& where) {
  const int64_t vectors = a.hidden / kWidth;
  const unsigned threads = threads_for(vectors, 1, kThreads), tokens = kThreads / threads;
  SMARTMOE_LAUNCH((sum_rows<T, kWidth, K>), dim3(static_cast<unsigned>((a.num_tokens + tokens - 1) / tokens)),
                  dim3(threads, tokens), 0, where.stream, static_cast<const Vector<T, kWidth>*>(a.y), a.num_rows,
                  a.rows_TK, a.weights, a.weight_type, a.num_tokens, a.num_choices,
                  static_cast<Vector<T, kWidth>*>(a.x), vectors);
  return leave();
}

// Vectors of 16 bytes where rows and pointers are multiples of that, else single elements.
template <class T>
LaunchError launch_widest(const Arguments& a, const Launch& where) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  if (a.hidden % kWidth != 0 || !is_aligned(a.y, kVectorBytes) || !is_aligned(a.x, kVectorBytes))
    return launch<T, 1, 0>(a, where);
  LaunchError error = nullptr;
  with_choices(a.num_choices, a.rows_TK, [&](auto k) { error = launch<T, kWidth, decltype(k)::value>(a, where); });
  return error;
}
}  // namespace

LaunchError launch_unpermute(const void* y, FloatType type, int64_t num_rows, const int32_t* rows_TK,
                             const void* weights, FloatType weight_type, int64_t num_tokens, int num_choices, void* x,
                             int64_t hidden, const Launch& where) {
  if (num_tokens == 0 || hidden == 0) return nullptr;
  LaunchError error = enter(where);
  if (error != nullptr) return error;
  const Arguments arguments{y, num_rows, rows_TK, weights, weight_type, num_tokens, num_choices, x, hidden};
  with_float_type(type, [&](auto zero) { error = launch_widest<decltype(zero)>(arguments, where); });
  return error;
}
}  // namespace smartmoe::cuda
