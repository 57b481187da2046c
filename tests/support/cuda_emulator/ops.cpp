// torch.ops.smartmoe_emulated.*: the ops of csrc/ops.cpp with their CUDA kernels, launchers and glue, on CPU tensors.
#include "ops.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

namespace {
// Draws the order of the threads of later launches.
void set_seed(int64_t seed) {
  cuda_emulator::seed() = static_cast<uint64_t>(seed);
}
}  // namespace

STABLE_TORCH_LIBRARY(smartmoe_emulated, m) {
  m.def("set_seed(int seed) -> ()");
  m.def("exact_split(Tensor counts_RE, int spare_slots, int num_nodes) -> (Tensor, Tensor)");
  m.def("dispatch_map(Tensor ids_TK, Tensor slot_of_E, int num_slots) -> (Tensor, Tensor)");
  m.def("permute(Tensor x_TH, Tensor rows_TK, int num_rows) -> Tensor");
  m.def("permute_joined(Tensor x_TH, Tensor more_TH, Tensor rows_TK, int num_rows) -> Tensor");
  m.def(
      "permute_packed(Tensor x_TH, Tensor weights_TK, Tensor? more_TH, Tensor? more_weights_TK, Tensor rows_TK, "
      "int num_rows) -> Tensor");
  m.def("unpermute(Tensor y_NH, Tensor rows_TK, Tensor? weights_TK) -> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_TH, Tensor y_NH, Tensor rows_TK, Tensor weights_TK) -> "
      "(Tensor, Tensor)");
  m.def("swiglu(Tensor inner_NG, Tensor probs_N) -> Tensor");
  m.def("swiglu_backward(Tensor grad_NF, Tensor inner_NG, Tensor probs_N) -> (Tensor, Tensor)");
  m.def("permute_weighted(Tensor x_TH, Tensor weights_TK, Tensor rows_TK, int num_rows) -> (Tensor, Tensor)");
  m.def("permute_weighted_backward(Tensor grad_NH, Tensor grad_N, Tensor rows_TK) -> (Tensor, Tensor)");
  m.def("chosen_experts(Tensor routing_map_TE, Tensor probs_TE, int top_k) -> (Tensor, Tensor)");
  m.def("chosen_experts_backward(Tensor grad_TK, Tensor ids_TK, int num_experts) -> Tensor");
  m.def("chunk_rows(Tensor counts_QS, int num_rows) -> (Tensor, Tensor)");
  m.def("zero_empty_groups(Tensor(a!) grad_SMK, Tensor ends_S) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smartmoe_emulated, CPU, m) {
  m.impl("exact_split", TORCH_BOX(&smartmoe::cuda::exact_split));
  m.impl("dispatch_map", TORCH_BOX(&smartmoe::cuda::dispatch_map));
  m.impl("permute", TORCH_BOX(&smartmoe::cuda::permute));
  m.impl("permute_joined", TORCH_BOX(&smartmoe::cuda::permute_joined));
  m.impl("permute_packed", TORCH_BOX(&smartmoe::cuda::permute_packed));
  m.impl("unpermute", TORCH_BOX(&smartmoe::cuda::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&smartmoe::cuda::unpermute_backward));
  m.impl("swiglu", TORCH_BOX(&smartmoe::cuda::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&smartmoe::cuda::swiglu_backward));
  m.impl("permute_weighted", TORCH_BOX(&smartmoe::cuda::permute_weighted));
  m.impl("permute_weighted_backward", TORCH_BOX(&smartmoe::cuda::permute_weighted_backward));
  m.impl("chosen_experts", TORCH_BOX(&smartmoe::cuda::chosen_experts));
  m.impl("chosen_experts_backward", TORCH_BOX(&smartmoe::cuda::chosen_experts_backward));
  m.impl("chunk_rows", TORCH_BOX(&smartmoe::cuda::chunk_rows));
  m.impl("zero_empty_groups", TORCH_BOX(&smartmoe::cuda::zero_empty_groups));
}

STABLE_TORCH_LIBRARY_IMPL(smartmoe_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_seed", TORCH_BOX(&set_seed));
}
