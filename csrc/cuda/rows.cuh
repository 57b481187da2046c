// What the kernels on permuted rows share: the choices of a token, and vectors of up to 16 bytes.
#pragma once
#include "device.cuh"

namespace smartmoe::cuda {
constexpr int kVectorBytes = 16;  // the widest load and store of a thread

// A choice that was dropped names no row. As unsigned, -1 is larger than any.
__device__ __forceinline__ bool is_row(int32_t row, int64_t num_rows) {
  return static_cast<uint64_t>(static_cast<int64_t>(row)) < static_cast<uint64_t>(num_rows);
}

// The rows of kCount choices of a token from `begin` on, -1 for those that name none or are at or behind num_choices.
// With kAligned the token has kCount choices in all and its map begins at a multiple of kCount * 4 bytes.
template <int kCount, bool kAligned>
__device__ __forceinline__ void load_rows(const int32_t* __restrict__ token_rows, int begin, int num_choices,
                                          int64_t num_rows, int32_t (&row)[kCount]) {
  if constexpr (kAligned && kCount % 4 == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(token_rows + j);
      row[j] = four.x, row[j + 1] = four.y, row[j + 2] = four.z, row[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) row[j] = kAligned || begin + j < num_choices ? token_rows[begin + j] : -1;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) row[j] = is_row(row[j], num_rows) ? row[j] : -1;
}

// Notes which choice named each row, for zero_unnamed_rows. Called by all threads of the token's group.
__device__ __forceinline__ void note_choices(const int32_t* __restrict__ token_rows, int64_t first_choice,
                                             int num_choices, int64_t num_rows, int32_t* __restrict__ choice_of_row) {
  for (int j = static_cast<int>(threadIdx.x); j < num_choices; j += static_cast<int>(blockDim.x)) {
    if (is_row(token_rows[j], num_rows)) choice_of_row[token_rows[j]] = static_cast<int32_t>(first_choice + j);
  }
}

// Calls f with a zero of an unsigned integer of so many bytes: what is only moved needs no type of its own.
template <class F>
void with_bits(int num_bytes, F&& f) {
  switch (num_bytes) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

// Moves one value of 1, 2, 4 or 8 bytes; from nowhere: zero.
__device__ __forceinline__ void move_bits(const void* from, int64_t i, void* to, int64_t j, int num_bytes) {
  switch (num_bytes) {
    case 1: static_cast<uint8_t*>(to)[j] = from ? static_cast<const uint8_t*>(from)[i] : 0; break;
    case 2: static_cast<uint16_t*>(to)[j] = from ? static_cast<const uint16_t*>(from)[i] : 0; break;
    case 4: static_cast<uint32_t*>(to)[j] = from ? static_cast<const uint32_t*>(from)[i] : 0; break;
    default: static_cast<uint64_t*>(to)[j] = from ? static_cast<const uint64_t*>(from)[i] : 0;
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Threads for a row of `vectors`, `per_thread` of them each if that many are there: a power of two, 32 to `most`.
inline unsigned threads_for(int64_t vectors, int per_thread, unsigned most) {
  unsigned threads = kWarpSize;
  while (threads < most && static_cast<int64_t>(threads) * per_thread < vectors) threads *= 2;
  return threads;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with Constant<num_choices> where there are kernels for just that number, else with Constant<0>.
template <class F>
void with_choices(int num_choices, const int32_t* rows_TK, F&& f) {
  switch (is_aligned(rows_TK, kVectorBytes) ? num_choices : 0) {
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 4: return f(Constant<4>{});
    case 8: return f(Constant<8>{});
    default: return f(Constant<0>{});
  }
}
}  // namespace smartmoe::cuda
