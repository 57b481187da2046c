// Schemas and registrations, a line per op and key. Written against torch's stable ABI: no Python.h, no ATen header, so
// one binary serves every Python and every torch since 2.10.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(smartmoe, m) {
  m.def("expert_histogram(Tensor ids, int num_experts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smartmoe, CPU, m) {
  m.impl("expert_histogram", TORCH_BOX(&smartmoe::cpu::expert_histogram));
}

#ifdef SMARTMOE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(smartmoe, CUDA, m) {
  m.impl("expert_histogram", TORCH_BOX(&smartmoe::cuda::expert_histogram));
}
#endif
