// What of a layer decides its time: the split that is best for the busiest rank, the traffic that it makes, and the
// transfers of the replicas along their trees, the C++ twin of megatron_smartmoe/placement/layer_cost.py:relayed_layer.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"
#include "sources.h"

namespace smartmoe::cpu {
namespace {
// Tokens that each source rank sends to each rank; tokens_C is used up.
void write_traffic(const Counts& counts, const Hosts& hosts, int64_t num_nodes, std::vector<int64_t>& tokens_C,
                   double* traffic_RR) {
  const int64_t num_ranks = counts.num_ranks;
  std::vector<int64_t> sent_RR(num_ranks * num_ranks, 0);
  std::vector<Index> single_E, rank_E;
  for (int64_t expert = 0; expert < counts.num_experts; ++expert) {
    if (hosts.num_hosts(expert) != 1) continue;
    single_E.push_back(static_cast<Index>(expert));
    rank_E.push_back(hosts.rank_C[hosts.begin_E[expert]]);
  }
  for (int64_t source = 0; source < num_ranks; ++source) {
    int64_t* sent_R = sent_RR.data() + source * num_ranks;
    for (size_t i = 0; i < single_E.size(); ++i) sent_R[rank_E[i]] += counts.row(source)[single_E[i]];
  }
  const auto record = [&](int64_t source, Index c, int64_t tokens) {
    sent_RR[source * num_ranks + hosts.rank_C[c]] += tokens;
  };
  Sources(counts, hosts, record).assign(tokens_C, num_nodes);
  std::copy(sent_RR.begin(), sent_RR.end(), traffic_RR);
}

// Tokens for homes on that rank with replicas which has fewest of them; 0 where there are no replicas.
int64_t early_tokens(const SlotTable& slots, const Placed& placed, const std::vector<int64_t>& tokens_C) {
  std::vector<int64_t> homes_R(slots.num_ranks, 0);
  std::vector<uint8_t> holds_R(slots.num_ranks, 0);
  for (size_t c = 0; c < tokens_C.size(); ++c) {
    const Index rank = placed.hosts.rank_C[c];
    if (placed.slot_C[c] < slots.home_slots) {
      homes_R[rank] += tokens_C[c];
    } else {
      holds_R[rank] = 1;
    }
  }
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    if (holds_R[rank]) least = std::min(least, homes_R[rank]);
  }
  return least == std::numeric_limits<int64_t>::max() ? 0 : least;
}

Steps steps_of_replicas(const SlotTable& slots, const Placed& placed, int64_t num_nodes) {
  return relay_steps(slots, relay_transfers(slots, placed, num_nodes), num_nodes);
}
}  // namespace

std::tuple<Tensor, Tensor, Tensor> relayed_flow(const Tensor& counts_RE, const Tensor& slots_RS, int64_t home_slots,
                                                int64_t num_nodes, const std::optional<Tensor>& kept_RS) {
  check_relayed_flow(counts_RE, slots_RS, home_slots, num_nodes, kept_RS);
  const Tensor dense_RE = torch::stable::contiguous(counts_RE);
  Tensor dense_RS = torch::stable::contiguous(slots_RS);
  const int64_t num_ranks = counts_RE.size(0), num_experts = counts_RE.size(1);
  const Counts counts{dense_RE.const_data_ptr<int64_t>(), num_ranks, num_experts, num_experts};
  const SlotTable slots{dense_RS.mutable_data_ptr<int64_t>(), num_ranks, slots_RS.size(1), home_slots};
  check_placement(slots, num_experts);
  // Step 1: who computes what.
  const std::vector<int64_t> load_E = total_load("counts_RE", counts);
  const Placed placed = find_placed(slots, num_experts);
  std::vector<int64_t> tokens_C = split_over_hosts(counts, placed.hosts, load_E);
  Tensor ranks_2R = torch::stable::new_zeros(dense_RE, {2, num_ranks});
  int64_t* tokens_R = ranks_2R.mutable_data_ptr<int64_t>();
  int64_t* active_R = tokens_R + num_ranks;
  for (size_t c = 0; c < tokens_C.size(); ++c) {
    tokens_R[placed.hosts.rank_C[c]] += tokens_C[c];
    active_R[placed.hosts.rank_C[c]] += tokens_C[c] > 0;
  }
  // Step 2: the transfers of replicas that follow one another, and what is computed before they are needed.
  Steps kept{0, 0};
  if (kept_RS) {
    Tensor dense_kept_RS = torch::stable::contiguous(*kept_RS);
    const SlotTable kept_slots{dense_kept_RS.mutable_data_ptr<int64_t>(), num_ranks, kept_RS->size(1), home_slots};
    check_placement(kept_slots, num_experts);
    kept = steps_of_replicas(kept_slots, find_placed(kept_slots, num_experts), num_nodes);
  }
  const Steps steps = steps_of_replicas(slots, placed, num_nodes);
  Tensor numbers_5 = torch::stable::new_empty(dense_RE, {5});
  int64_t* number = numbers_5.mutable_data_ptr<int64_t>();
  for (const int64_t each :
       {early_tokens(slots, placed, tokens_C), steps.inside, steps.between, kept.inside, kept.between}) {
    *number++ = each;
  }
  // Step 3: who sends it where.
  Tensor traffic_RR = torch::stable::new_empty(dense_RE, {num_ranks, num_ranks}, ScalarType::Double);
  write_traffic(counts, placed.hosts, num_nodes, tokens_C, traffic_RR.mutable_data_ptr<double>());
  return {traffic_RR, ranks_2R, numbers_5};
}
}  // namespace smartmoe::cpu
