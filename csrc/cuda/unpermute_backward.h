// Launch interface of the backward of a weighted unpermute: T tokens, K choices of each, N rows of H elements.
#pragma once
#include <cstdint>

#include "float_type.h"
#include "launch.h"

namespace smartmoe::cuda {
// For each choice of a token that names a row: grad_y [N, H] = its weight times the token's row of grad [T, H], and
// grad_weights [T, K] = the dot product of that row of grad and the named row of y [N, H]. Both are zero elsewhere.
// grad_y is of the type of y, grad_weights of that of weights. choice_of_row [N]: scratch.
LaunchError launch_unpermute_backward(const void* grad, const void* y, FloatType type, int64_t num_rows,
                                      const int32_t* rows_TK, const void* weights, FloatType weight_type,
                                      int64_t num_tokens, int num_choices, void* grad_y, void* grad_weights,
                                      int64_t hidden, int32_t* choice_of_row, const Launch& where);
}  // namespace smartmoe::cuda
