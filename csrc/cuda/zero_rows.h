// Clears the rows that no choice names: of the result of permute, and of the gradient that unpermute_backward makes.
#pragma once
#include <cstdint>

#include "launch.h"

namespace smartmoe::cuda {
// rows [n] names rows of y [num_rows, row_bytes]. For each row that is named, choice_of_row [num_rows] has a choice
// that names it; its other elements may hold anything, so nobody has to clear it.
LaunchError launch_zero_unnamed_rows(const int32_t* rows, int64_t num_choices, const int32_t* choice_of_row, void* y,
                                     int64_t num_rows, int64_t row_bytes, const Launch& where);
}  // namespace smartmoe::cuda
