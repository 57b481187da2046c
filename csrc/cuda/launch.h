// What every launcher takes and returns. Plain C++: neither torch nor the CUDA headers, so the glue compiles without
// the toolkit and the kernels compile without torch.
#pragma once

namespace smartmoe::cuda {
// Where a kernel runs: the device's index and its cudaStream_t.
struct Launch {
  int device;
  void* stream;
};

// nullptr, or the text of the CUDA error that stopped the launch (static storage).
using LaunchError = const char*;
}  // namespace smartmoe::cuda
