// Unpermute on the GPU, bound by memory: (K + 1) rows of traffic per token.
//
// Method: by token. A thread owns a few columns, has the loads of all K rows in flight before it uses the first, and
// adds them in float, in the order of the choices: no atomics, the same bits for every placement of the experts.
// Alternative: by row, adding into the token's sum with atomics. It reads and writes the sums K times, in an order that
// changes from run to run.
#include "floats.cuh"

namespace smartmoe::cuda {
namespace {
constexpr unsigned kThreads = 256;

// Block (threads of a token, tokens). K is the number of choices, 0 for any; weights may be nullptr.
template <class T, int kWidth, int K>
__global__ void __launch_bounds__(kThreads)
    sum_rows(const Vector<T, kWidth>* __restrict__ y, int64_t y_vectors, int64_t num_rows,
             const int32_t* __restrict__ rows_TK, const void* __restrict__ weights, FloatType weight_type,
             int64_t num_tokens, int any_choices, Vector<T, kWidth>* __restrict__ x, int64_t vectors,
             const void* moved_N, int64_t moved_pitch, void* moved_TK, int moved_bytes) {
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
        if (row[j] >= 0) chosen[j] = load_once(y + row[j] * y_vectors + c);
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
  if (moved_N == nullptr) return;
  for (int j = static_cast<int>(threadIdx.x); j < num_choices; j += static_cast<int>(blockDim.x)) {
    const bool is_named = is_row(token_rows[j], num_rows);
    move_bits(is_named ? moved_N : nullptr, token_rows[j] * moved_pitch, moved_TK, token * num_choices + j,
              moved_bytes);
  }
}

template <class T, int kWidth, int K>
LaunchError launch(const UnpermuteArgs& args, const Stream& stream) {
  const int64_t vectors = args.hidden / kWidth;
  const unsigned threads = threads_for(vectors, 1, kThreads), tokens = kThreads / threads;
  SMARTMOE_LAUNCH((sum_rows<T, kWidth, K>), dim3(static_cast<unsigned>((args.num_tokens + tokens - 1) / tokens)),
                  dim3(threads, tokens), 0, stream.handle, static_cast<const Vector<T, kWidth>*>(args.y_NH),
                  args.y_pitch / static_cast<int64_t>(sizeof(Vector<T, kWidth>)), args.num_rows, args.rows_TK,
                  args.weights_TK, args.weight_type, args.num_tokens, args.num_choices,
                  static_cast<Vector<T, kWidth>*>(args.x_TH), vectors, args.moved_N, args.moved_pitch, args.moved_TK,
                  args.moved_bytes);
  return last_launch_error();
}

// Vectors of 16 bytes where rows and pointers are multiples of that, else single elements.
template <class T>
LaunchError launch_widest(const UnpermuteArgs& args, const Stream& stream) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  if (args.hidden % kWidth != 0 || args.y_pitch % kVectorBytes != 0 || !is_aligned(args.y_NH, kVectorBytes) ||
      !is_aligned(args.x_TH, kVectorBytes))
    return launch<T, 1, 0>(args, stream);
  LaunchError error = nullptr;
  with_choices(args.num_choices, args.rows_TK,
               [&](auto k) { error = launch<T, kWidth, decltype(k)::value>(args, stream); });
  return error;
}
}  // namespace

LaunchError launch_unpermute(const UnpermuteArgs& args, const Stream& stream) {
  if (args.num_tokens == 0 || (args.hidden == 0 && args.moved_TK == nullptr)) return nullptr;
  LaunchError error = set_device(stream);
  if (error != nullptr) return error;
  with_float_type(args.type, [&](auto zero) { error = launch_widest<decltype(zero)>(args, stream); });
  return error;
}
}  // namespace smartmoe::cuda
