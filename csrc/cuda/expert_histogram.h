// Launch interface of the expert histogram: T ids, E experts, N tiles.
#pragma once
#include <cstdint>

#include "launch.h"

namespace smartmoe::cuda {
// How many blocks count in parallel: the N of the scratch tile_counts [N, E].
int expert_histogram_num_tiles(int64_t num_ids);

// counts [num_experts] = how often each expert occurs in ids [num_ids] (int64 if ids_are_int64, else int32); ids
// outside [0, num_experts) are ignored. Every element of tile_counts and counts is written: neither needs clearing.
LaunchError launch_expert_histogram(const void* ids, bool ids_are_int64, int64_t num_ids, int num_experts,
                                    uint32_t* tile_counts, int64_t* counts, const Launch& where);
}  // namespace smartmoe::cuda
