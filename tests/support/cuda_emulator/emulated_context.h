// Included before all else when glue.cpp is built for the emulator, in the place of csrc/cuda/context.h: kernels that
// run on the CPU need no device, no stream and no guard.
#pragma once
#define SMARTMOE_CONTEXT
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/launchers.h"

namespace smartmoe::cuda {
class Context {
 public:
  explicit Context(const torch::stable::Tensor&) {}
  const Stream& stream() const { return stream_; }
  static void check(const char* op, LaunchError error) {
    if (error != nullptr) fail("smartmoe::", op, ": ", error);
  }

 private:
  Stream stream_{.device = 0, .handle = nullptr};
};
}  // namespace smartmoe::cuda
