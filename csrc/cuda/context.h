// Makes a tensor's device current in torch and finds the stream that torch is using on it. device.cuh says who defines
// the macro beforehand.
#pragma once
#ifndef SMARTMOE_CONTEXT
#define SMARTMOE_CONTEXT
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "launchers.h"

// Lives in libtorch_cuda. Weak, so that the same library also loads where torch was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace smartmoe::cuda {
class Context {
 public:
  explicit Context(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device()), stream_{.device = tensor.get_device(), .handle = nullptr} {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      fail("CUDA tensor, but this torch build has no CUDA. Install a torch build with CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(stream_.device, &stream_.handle));
  }

  const Stream& stream() const { return stream_; }

  static void check(const char* op, LaunchError error) {
    if (error != nullptr) fail("smartmoe::", op, ": CUDA error: ", error);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};
}  // namespace smartmoe::cuda
#endif
