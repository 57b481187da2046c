// Division that rounds up: the smallest level that num_ranks ranks can hold `tokens` at.
#pragma once
#include <cstdint>

namespace smartmoe::cpu {
// Neither number is negative. Not (tokens + num_ranks - 1) / num_ranks, which may overflow.
inline int64_t ceil_div(int64_t tokens, int64_t num_ranks) {
  return tokens / num_ranks + (tokens % num_ranks != 0);
}
}  // namespace smartmoe::cpu
