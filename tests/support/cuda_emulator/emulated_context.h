// Included before all else when torch's glue is built for the emulator: kernels that run on the CPU need no device, no
// stream and no guard.
#pragma once
#define SMARTMOE_CONTEXT
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/launch.h"

namespace smartmoe::cuda {
class Context {
 public:
  explicit Context(const torch::stable::Tensor&) {}
  const Launch& launch() const { return launch_; }
  static void check(const char* op, LaunchError error) {
    if (error != nullptr) fail("smartmoe::", op, ": ", error);
  }

 private:
  Launch launch_{0, nullptr};
};
}  // namespace smartmoe::cuda
