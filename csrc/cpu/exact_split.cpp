// Replicas from the exact load, without the search behind the greedy pass, and the split over them: what the kernel of
// this name plans on a GPU.
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"

namespace smartmoe::cpu {
std::tuple<Tensor, Tensor> exact_split(const Tensor& counts_RE, int64_t spare_slots, int64_t num_nodes) {
  check_exact_split(counts_RE, spare_slots, num_nodes);
  const Tensor dense = torch::stable::contiguous(counts_RE);
  const int64_t num_ranks = counts_RE.size(0), num_experts = counts_RE.size(1), home_slots = num_experts / num_ranks;
  const Counts counts{dense.const_data_ptr<int64_t>(), num_ranks, num_experts, num_experts};
  const std::vector<int64_t> load_E = total_load("counts_RE", counts);

  Tensor slots_RS = torch::stable::new_empty(dense, {num_ranks, home_slots + spare_slots});
  Tensor tokens_RS = torch::stable::new_zeros(dense, {num_ranks, home_slots + spare_slots});
  const SlotTable slots{slots_RS.mutable_data_ptr<int64_t>(), num_ranks, home_slots + spare_slots, home_slots};
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    std::iota(slots.row(rank), slots.row(rank) + home_slots, rank * home_slots);
  }
  fill_spare_slots(load_E, slots, num_nodes, 0);
  const Placed placed = find_placed(slots, num_experts);
  const std::vector<int64_t> tokens_C = split_over_hosts(counts, placed.hosts, load_E);
  int64_t* tokens = tokens_RS.mutable_data_ptr<int64_t>();
  for (size_t c = 0; c < tokens_C.size(); ++c) {
    tokens[placed.hosts.rank_C[c] * slots.num_slots + placed.slot_C[c]] = tokens_C[c];
  }
  return {slots_RS, tokens_RS};
}
}  // namespace smartmoe::cpu
