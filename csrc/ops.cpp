// Schemas and registrations, a line per op and key. Written against torch's stable ABI: no Python.h, no ATen header, so
// one binary serves every Python and every torch since 2.10.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(smartmoe, m) {
  m.def("digest_sum(Tensor bits_N, Tensor positions_L, int width, int value_factor) -> int");
  m.def("min_max_split(Tensor counts_RE, Tensor hosts_ER) -> Tensor");
  m.def("exact_replicas(Tensor load_E, Tensor slots_RS, int home_slots, int num_nodes) -> Tensor");
  m.def("dispatch_map(Tensor ids_TK, Tensor slot_of_E, int num_slots) -> (Tensor, Tensor)");
  m.def("permute(Tensor x_TH, Tensor rows_TK, int num_rows) -> Tensor");
  m.def("unpermute(Tensor y_NH, Tensor rows_TK, Tensor? weights_TK) -> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_TH, Tensor y_NH, Tensor rows_TK, Tensor weights_TK) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(smartmoe, CPU, m) {
  m.impl("digest_sum", TORCH_BOX(&smartmoe::cpu::digest_sum));
  m.impl("min_max_split", TORCH_BOX(&smartmoe::cpu::min_max_split));
  m.impl("exact_replicas", TORCH_BOX(&smartmoe::cpu::exact_replicas));
  m.impl("dispatch_map", TORCH_BOX(&smartmoe::cpu::dispatch_map));
  m.impl("permute", TORCH_BOX(&smartmoe::cpu::permute));
  m.impl("unpermute", TORCH_BOX(&smartmoe::cpu::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&smartmoe::cpu::unpermute_backward));
}

#ifdef SMARTMOE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(smartmoe, CUDA, m) {
  m.impl("dispatch_map", TORCH_BOX(&smartmoe::cuda::dispatch_map));
  m.impl("permute", TORCH_BOX(&smartmoe::cuda::permute));
  m.impl("unpermute", TORCH_BOX(&smartmoe::cuda::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&smartmoe::cuda::unpermute_backward));
}
#endif
