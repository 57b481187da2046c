// Torch's side of a launch: makes the tensor's device current and finds the stream that torch is using on it. Where the
// macro is defined already, as by tests/support/cuda_emulator, the Context is another one.
#pragma once
#ifndef SMARTMOE_CONTEXT
#define SMARTMOE_CONTEXT
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "launch.h"

// Lives in libtorch_cuda. Weak, so that the same library also loads where torch was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace smartmoe::cuda {
class Context {
 public:
  explicit Context(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device()), launch_{tensor.get_device(), nullptr} {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      fail("a CUDA tensor reached a torch without CUDA. Install a CUDA torch");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(launch_.device, &launch_.stream));
  }

  const Launch& launch() const { return launch_; }

  static void check(const char* op, LaunchError error) {
    if (error != nullptr) fail("smartmoe::", op, ": CUDA error: ", error);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Launch launch_;
};
}  // namespace smartmoe::cuda
#endif
