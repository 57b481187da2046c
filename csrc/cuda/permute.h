// Launch interface of permute: T tokens, K choices of each, N rows of row_bytes bytes.
#pragma once
#include <cstdint>

#include "launch.h"

namespace smartmoe::cuda {
// y [N] = the row of x [T] that names it in rows_TK [T, K], zero where none does. choice_of_row [N]: scratch.
LaunchError launch_permute(const void* x, const int32_t* rows_TK, int64_t num_tokens, int num_choices, void* y,
                           int64_t num_rows, int64_t row_bytes, int32_t* choice_of_row, const Launch& where);
}  // namespace smartmoe::cuda
