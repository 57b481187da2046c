// Launch interface of the counting sort: n choices in N tiles, E experts, S slots.
#pragma once
#include <cstdint>

#include "launch.h"

namespace smartmoe::cuda {
// Integers on the device, of either width.
struct IntArray {
  const void* data;
  bool is_int64;
};

// How many blocks sort in parallel: the N of the scratch tile_counts [N, S].
int dispatch_map_num_tiles(int64_t num_choices);

// rows [n] = row of each choice, -1 where it is dropped; tokens [S] = rows of each slot. Choices whose id is outside
// [0, E), or whose slot is outside [0, S), are dropped. Every element of tile_counts, rows and tokens is written. Any
// num_tiles >= 1 gives the same result.
LaunchError launch_dispatch_map(IntArray ids, int64_t num_choices, IntArray slot_of, int64_t num_experts, int num_slots,
                                int num_tiles, uint32_t* tile_counts, int32_t* rows, int64_t* tokens,
                                const Launch& where);
}  // namespace smartmoe::cuda
