// Permute on the GPU, bound by memory: (1 + K) rows of traffic per token.
//
// Method: by token. A group of threads reads its token's row once, in vectors of 16 bytes of which each thread has four
// in flight, and writes it K times. Rows that no token names are cleared afterwards.
// Alternative: by row of the result, a plain gather. It reads every row K times, and whether the L2 cache serves K - 1
// of them depends on how far apart the slots of a token's experts are.
#include "rows.cuh"

namespace smartmoe::cuda {
namespace {
constexpr unsigned kThreads = 128;
constexpr int kInFlight = 4;
constexpr int kBlocks = 8;  // on a multiprocessor: 64 registers a thread, 64 KiB in flight

// Block (threads of a token, tokens). K is the number of choices, 0 for any.
template <class Vector, int K>
__global__ void __launch_bounds__(kThreads, kBlocks)
    copy_rows(const Vector* __restrict__ x, const int32_t* __restrict__ rows_TK, int64_t num_tokens, int any_choices,
              Vector* __restrict__ y, int64_t num_rows, int64_t vectors, int32_t* __restrict__ choice_of_row,
              const void* weights_TK, void* weights_N, int weight_bytes) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  const int num_choices = K > 0 ? K : any_choices;
  const int32_t* token_rows = rows_TK + token * num_choices;
  const Vector* from = x + token * vectors;
  constexpr int kStep = K > 0 ? K : 4;
  int32_t row[kStep];
  if constexpr (K > 0) load_rows<K, true>(token_rows, 0, K, num_rows, row);
  const int64_t threads = blockDim.x;
  for (int64_t begin = threadIdx.x; begin < vectors; begin += threads * kInFlight) {
    Vector vector[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i * threads < vectors) vector[i] = __ldcs(from + begin + i * threads);  // not needed again
    }
    for (int j0 = 0; j0 < num_choices; j0 += kStep) {
      if constexpr (K == 0) load_rows<kStep, false>(token_rows, j0, num_choices, num_rows, row);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        if (row[j] < 0) continue;
        Vector* to = y + row[j] * vectors;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (begin + i * threads < vectors) to[begin + i * threads] = vector[i];
        }
      }
    }
  }
  note_choices(token_rows, token * num_choices, num_choices, num_rows, choice_of_row);
  if (weights_TK == nullptr) return;
  for (int j = static_cast<int>(threadIdx.x); j < num_choices; j += static_cast<int>(blockDim.x)) {
    if (is_row(token_rows[j], num_rows))
      move_bits(weights_TK, token * num_choices + j, weights_N, token_rows[j], weight_bytes);
  }
}

template <class Vector, int K>
LaunchError launch(const PermuteArgs& args, const Stream& stream) {
  const int64_t vectors = args.row_bytes / static_cast<int64_t>(sizeof(Vector));
  const unsigned threads = threads_for(vectors, kInFlight, kThreads), tokens = kThreads / threads;
  SMARTMOE_LAUNCH((copy_rows<Vector, K>), dim3(static_cast<unsigned>((args.num_tokens + tokens - 1) / tokens)),
                  dim3(threads, tokens), 0, stream.handle, static_cast<const Vector*>(args.x_TH), args.rows_TK,
                  args.num_tokens, args.num_choices, static_cast<Vector*>(args.y_NH), args.num_rows, vectors,
                  args.choice_of_row, args.weights_TK, args.weights_N, args.weight_bytes);
  return last_launch_error();
}

// The widest vector that rows and pointers are multiples of. Narrow ones are rare: one kernel each has to do.
LaunchError launch_widest(const PermuteArgs& args, const Stream& stream) {
  const auto fits = [&](int64_t bytes) {
    return args.row_bytes % bytes == 0 && is_aligned(args.x_TH, bytes) && is_aligned(args.y_NH, bytes);
  };
  if (fits(4) && !fits(kVectorBytes)) return launch<uint32_t, 0>(args, stream);
  if (fits(2) && !fits(kVectorBytes)) return launch<uint16_t, 0>(args, stream);
  if (!fits(kVectorBytes)) return launch<uint8_t, 0>(args, stream);
  LaunchError error = nullptr;
  with_choices(args.num_choices, args.rows_TK,
               [&](auto k) { error = launch<uint4, decltype(k)::value>(args, stream); });
  return error;
}
}  // namespace

LaunchError launch_permute(const PermuteArgs& args, const Stream& stream) {
  if (const LaunchError error = set_device(stream)) return error;
  const bool has_values = args.row_bytes > 0 || args.weights_TK != nullptr;
  if (args.num_tokens > 0 && args.num_choices > 0 && args.num_rows > 0 && has_values) {
    if (const LaunchError error = launch_widest(args, stream)) return error;
  }
  const ZeroUnnamedRowsArgs unnamed{
      .rows_TK = args.rows_TK,
      .num_choices = args.num_tokens * args.num_choices,
      .choice_of_row = args.choice_of_row,
      .y_NH = args.y_NH,
      .num_rows = args.num_rows,
      .row_bytes = args.row_bytes,
      .weights_N = args.weights_N,
      .weight_bytes = args.weight_bytes,
  };
  return launch_zero_unnamed_rows(unnamed, stream);
}
}  // namespace smartmoe::cuda
