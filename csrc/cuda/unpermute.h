// Launch interface of unpermute: T tokens, K choices of each, N rows of H elements.
#pragma once
#include <cstdint>

#include "float_type.h"
#include "launch.h"

namespace smartmoe::cuda {
// x [T, H] = sum over the choices, in their order, of weights [T, K] (1 where nullptr) times the row of y [N, H] that
// rows_TK [T, K] names; a choice that names none adds nothing.
LaunchError launch_unpermute(const void* y, FloatType type, int64_t num_rows, const int32_t* rows_TK,
                             const void* weights, FloatType weight_type, int64_t num_tokens, int num_choices, void* x,
                             int64_t hidden, const Launch& where);
}  // namespace smartmoe::cuda
