// Who feeds whom, the C++ twin of megatron_smartmoe/placement/relay.py, which explains the method: same steps, same
// order, same choices among equals.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
// A rank that holds an expert, and the column of the slot table in which it does.
struct Holder {
  int64_t rank, slot;
};

// Builds the tree of one expert.
class Tree {
 public:
  Tree(std::vector<int64_t>& sends_R, int64_t per_node, std::vector<Transfer>& transfers)
      : sends_R_(sends_R), per_node_(per_node), transfers_(transfers) {}

  // Feeds one holder of every other node, then the other holders from inside their nodes.
  void feed_nodes(const Holder& home, std::vector<Holder> holders) {
    sort_least_first(holders);
    std::vector<Holder> inside, first;
    std::vector<std::vector<Holder>> others;
    for (const Holder& holder : holders) {
      const int64_t node = holder.rank / per_node_;
      if (node == home.rank / per_node_) {
        inside.push_back(holder);
        continue;
      }
      size_t at = 0;
      while (at < first.size() && first[at].rank / per_node_ != node) ++at;
      if (at == first.size()) {
        first.push_back(holder);
        others.emplace_back();
      } else {
        others[at].push_back(holder);
      }
    }
    const int64_t rounds = feed(home, first, 0);
    feed(home, inside, rounds);
    for (size_t at = 0; at < first.size(); ++at) feed(first[at], others[at], rounds);
  }

 private:
  // Feeds holders from a rank that has the weights, from a round on; returns the first round that is free.
  int64_t feed(const Holder& root, const std::vector<Holder>& holders, int64_t first_round) {
    const int64_t members = static_cast<int64_t>(holders.size()) + 1;
    int64_t left = 0;
    while ((int64_t{1} << left) < members) ++left;
    std::vector<Holder> have{root}, senders;
    size_t next = 0;
    for (int64_t turn = 0; turn < left; ++turn) {
      // As many must have the weights after this round as can be doubled to all of them in the rounds after it.
      const int64_t needed = ceil_div(members, int64_t{1} << (left - 1 - turn)) - static_cast<int64_t>(have.size());
      senders = have;
      sort_least_first(senders);
      for (int64_t i = 0; i < needed; ++i) {
        const Holder &parent = senders[i], &child = holders[next++];
        ++sends_R_[parent.rank];
        transfers_.push_back({first_round + turn, parent.rank, child.rank, child.slot, parent.slot});
        have.push_back(child);
      }
    }
    return first_round + left;
  }

  void sort_least_first(std::vector<Holder>& holders) const {
    std::sort(holders.begin(), holders.end(), [&](const Holder& a, const Holder& b) {
      return sends_R_[a.rank] != sends_R_[b.rank] ? sends_R_[a.rank] < sends_R_[b.rank] : a.rank < b.rank;
    });
  }

  std::vector<int64_t>& sends_R_;
  const int64_t per_node_;
  std::vector<Transfer>& transfers_;
};
}  // namespace

std::vector<Transfer> relay_transfers(const SlotTable& slots, const Placed& placed, int64_t num_nodes) {
  // Step 1: the experts with replicas, those with the most first; every home sends each of them at least once.
  std::vector<int64_t> expert_X, home_X, sends_R(slots.num_ranks, 0);
  const Hosts& hosts = placed.hosts;
  const int64_t num_experts = static_cast<int64_t>(hosts.begin_E.size()) - 1;
  std::vector<Index> home_E(num_experts, 0);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (hosts.num_hosts(expert) < 2) continue;
    Index home = hosts.begin_E[expert];
    while (placed.slot_C[home] >= slots.home_slots) ++home;
    home_E[expert] = home;
    ++sends_R[hosts.rank_C[home]];
    expert_X.push_back(expert);
  }
  std::stable_sort(expert_X.begin(), expert_X.end(),
                   [&](int64_t a, int64_t b) { return hosts.num_hosts(a) > hosts.num_hosts(b); });
  // Step 2: one expert's tree after the other.
  std::vector<Transfer> transfers;
  for (const int64_t expert : expert_X) {
    std::vector<Holder> holders;
    for (Index c = hosts.begin_E[expert]; c < hosts.begin_E[expert + 1]; ++c) {
      if (c != home_E[expert]) holders.push_back({hosts.rank_C[c], placed.slot_C[c]});
    }
    const Holder home{hosts.rank_C[home_E[expert]], placed.slot_C[home_E[expert]]};
    --sends_R[home.rank];
    Tree(sends_R, slots.num_ranks / num_nodes, transfers).feed_nodes(home, std::move(holders));
  }
  return transfers;
}

namespace {
// Of the transfers that cross nodes, or of those that do not; in the order of their rounds.
int64_t steps_of(int64_t num_ranks, const std::vector<Transfer>& transfers, int64_t per_node, bool crossing) {
  std::vector<int64_t> ended_R(num_ranks, 0), next_R(num_ranks, 0);  // of the rounds so far
  std::vector<int64_t> sent_R(num_ranks, 0), received_R(num_ranks, 0);
  const auto counts = [&](const Transfer& transfer) {
    return (transfer.parent / per_node != transfer.rank / per_node) == crossing;
  };
  for (auto first = transfers.begin(); first != transfers.end();) {
    auto last = first;
    for (; last != transfers.end() && last->round == first->round; ++last) {
      if (!counts(*last)) continue;
      ++sent_R[last->parent];
      ++received_R[last->rank];
    }
    for (auto at = first; at != last; ++at) {
      if (!counts(*at)) continue;
      const int64_t end =
          std::max(ended_R[at->parent], ended_R[at->rank]) + std::max(sent_R[at->parent], received_R[at->rank]);
      next_R[at->parent] = std::max(next_R[at->parent], end);
      next_R[at->rank] = std::max(next_R[at->rank], end);
    }
    for (; first != last; ++first) {
      for (const int64_t rank : {first->parent, first->rank}) {
        ended_R[rank] = next_R[rank];
        sent_R[rank] = received_R[rank] = 0;
      }
    }
  }
  return *std::max_element(ended_R.begin(), ended_R.end());
}
}  // namespace

Steps relay_steps(const SlotTable& slots, std::vector<Transfer> transfers, int64_t num_nodes) {
  std::sort(transfers.begin(), transfers.end(), [](const Transfer& a, const Transfer& b) { return a.round < b.round; });
  const int64_t per_node = slots.num_ranks / num_nodes;
  return {steps_of(slots.num_ranks, transfers, per_node, false),
          num_nodes > 1 ? steps_of(slots.num_ranks, transfers, per_node, true) : 0};
}

Tensor relay_tree(const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes) {
  check_relay_tree(slots_RS, home_slots, num_nodes);
  Tensor dense_RS = torch::stable::contiguous(slots_RS);
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), spare = num_slots - home_slots;
  const SlotTable slots{dense_RS.mutable_data_ptr<int64_t>(), num_ranks, num_slots, home_slots};
  check_placement(slots, num_ranks * home_slots);
  Tensor tree_3RK = torch::stable::new_empty(dense_RS, {3, num_ranks, spare});
  int64_t* tree = tree_3RK.mutable_data_ptr<int64_t>();
  std::fill(tree, tree + 3 * num_ranks * spare, kEmpty);
  for (const Transfer& transfer : relay_transfers(slots, find_placed(slots, num_ranks * home_slots), num_nodes)) {
    int64_t* at = tree + transfer.rank * spare + transfer.slot - home_slots;
    for (const int64_t field : {transfer.parent, transfer.parent_slot, transfer.round}) {
      *at = field;
      at += num_ranks * spare;
    }
  }
  return tree_3RK;
}
}  // namespace smartmoe::cpu
