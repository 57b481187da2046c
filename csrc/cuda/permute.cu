// Permute on the GPU, bound by memory: (1 + K) rows of traffic per token.
//
// Method: by token. A group of threads reads its token's row once, in vectors of 16 bytes of which each thread has four
// in flight, and writes it K times. Rows that no token names are cleared afterwards. Rows may lie apart, with their
// weights behind them, and the tokens may be two blocks: packing rows and weights for an exchange, and joining what two
// GEMMs have made, take no launch of their own.
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
__global__ void __launch_bounds__(kThreads, kBlocks) copy_rows(PermuteArgs args) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= args.num_tokens) return;
  const int num_choices = K > 0 ? K : args.num_choices;
  const int64_t num_rows = args.num_rows, vectors = args.row_bytes / static_cast<int64_t>(sizeof(Vector));
  const int32_t* token_rows = args.rows_TK + token * num_choices;
  const bool is_first = token < args.num_first;
  const TokenBlock& block = is_first ? args.first : args.second;
  const int64_t at = is_first ? token : token - args.num_first;  // in its block
  const auto* from = reinterpret_cast<const Vector*>(static_cast<const char*>(block.x_TH) + at * block.x_pitch);
  auto* y = static_cast<char*>(args.y_NH);
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
        auto* to = reinterpret_cast<Vector*>(y + row[j] * args.y_pitch);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (begin + i * threads < vectors) to[begin + i * threads] = vector[i];
        }
      }
    }
  }
  note_choices(token_rows, token * num_choices, num_choices, num_rows, args.choice_of_row);
  if (args.weights_N == nullptr) return;
  for (int j = static_cast<int>(threadIdx.x); j < num_choices; j += static_cast<int>(blockDim.x)) {
    if (is_row(token_rows[j], num_rows))
      move_bits(block.weights_TK, at * block.weights_pitch + j, args.weights_N, token_rows[j] * args.weights_N_pitch,
                args.weight_bytes);
  }
}

template <class Vector, int K>
LaunchError launch(const PermuteArgs& args, const Stream& stream) {
  const int64_t vectors = args.row_bytes / static_cast<int64_t>(sizeof(Vector));
  const unsigned threads = threads_for(vectors, kInFlight, kThreads), tokens = kThreads / threads;
  SMARTMOE_LAUNCH((copy_rows<Vector, K>), dim3(static_cast<unsigned>((args.num_tokens + tokens - 1) / tokens)),
                  dim3(threads, tokens), 0, stream.handle, args);
  return last_launch_error();
}

// The widest vector that rows and pointers are multiples of. Narrow ones are rare: one kernel each has to do.
LaunchError launch_widest(const PermuteArgs& args, const Stream& stream) {
  const auto fits = [&](int64_t bytes) {
    const auto block_fits = [&](const TokenBlock& block) {
      return is_aligned(block.x_TH, bytes) && block.x_pitch % bytes == 0;
    };
    return args.row_bytes % bytes == 0 && block_fits(args.first) && block_fits(args.second) &&
           is_aligned(args.y_NH, bytes) && args.y_pitch % bytes == 0;
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
  const bool has_values = args.row_bytes > 0 || args.weights_N != nullptr;
  if (args.num_tokens > 0 && args.num_choices > 0 && args.num_rows > 0 && has_values) {
    if (const LaunchError error = launch_widest(args, stream)) return error;
  }
  const ZeroUnnamedRowsArgs unnamed{
      .rows_TK = args.rows_TK,
      .num_choices = args.num_tokens * args.num_choices,
      .choice_of_row = args.choice_of_row,
      .y_NH = args.y_NH,
      .y_pitch = args.y_pitch,
      .num_rows = args.num_rows,
      .row_bytes = args.row_bytes,
      .weights_N = args.weights_N,
      .weights_pitch = args.weights_N_pitch,
      .weight_bytes = args.weight_bytes,
  };
  return launch_zero_unnamed_rows(unnamed, stream);
}
}  // namespace smartmoe::cuda
