// The vocabulary of kernels and launchers. Launches and shared memory go through macros because their CUDA syntax is
// not C++. Tests define these macros, and that of context.h, beforehand (tests/support/cuda_emulator): that compiles
// kernels, launchers and glue for the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "launchers.h"

#ifndef SMARTMOE_LAUNCH
#define SMARTMOE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define SMARTMOE_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char smartmoe_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(smartmoe_dynamic_shared)

// `extents` are those of an array, brackets included.
#define SMARTMOE_SHARED(type, name, extents) __shared__ type name extents
#endif

namespace smartmoe::cuda {
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

inline LaunchError error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Needed although torch's guard has set the device: this library carries a CUDA runtime of its own, linked statically.
inline LaunchError set_device(const Stream& stream) {
  return error_text(cudaSetDevice(stream.device));
}

// The launch's own error (a wrong configuration); errors of the running kernel surface at torch's next synchronisation.
inline LaunchError last_launch_error() {
  return error_text(cudaGetLastError());
}
}  // namespace smartmoe::cuda
