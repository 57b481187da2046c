// The planning of one layer on plain memory: what the ops of single steps and the op that does them all share. R ranks,
// E experts, S slots of a rank, C the hosts of all experts, those of one expert side by side.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace smartmoe::cpu {
// 32-bit: positions on axis C, of which there are at most E x R.
using Index = int32_t;
constexpr int64_t kTrials = 16;  // placement/exact_search.py:TRIALS
constexpr int64_t kEmpty = -1;   // instead of an expert: a slot without one

// Tokens of each source rank for each expert, a row per rank.
struct Counts {
  const int64_t* data;
  int64_t num_ranks, num_experts, stride;  // of the rows

  const int64_t* row(int64_t rank) const { return data + rank * stride; }
};

// The ranks of every expert, ascending: those of expert e are rank_C[begin_E[e]] up to begin_E[e + 1].
struct Hosts {
  std::vector<Index> begin_E, rank_C;

  Index num_hosts(int64_t expert) const { return begin_E[expert + 1] - begin_E[expert]; }
};

// The slots of a layer: those of a rank side by side, its homes first.
struct SlotTable {
  int64_t* data;
  int64_t num_ranks, num_slots, home_slots;

  int64_t* row(int64_t rank) const { return data + rank * num_slots; }
};

// The hosts of all experts and the slot of each.
struct Placed {
  Hosts hosts;
  std::vector<Index> slot_C;
};

// The way of a replica's weights; its gradient takes it back. `slot` and `parent_slot` are columns of the slot table.
struct Transfer {
  int64_t round, parent, rank, slot, parent_slot;
};

// Tokens of each expert, in one load or several.
using Loads = std::vector<std::vector<int64_t>>;

// A split that takes no heed of where tokens come from.
struct Balance {
  int64_t bound;                  // tokens of the busiest rank
  std::vector<int64_t> tokens_C;  // of each host
  std::vector<int64_t> load_R;
  std::vector<Index> cut;  // ranks whose experts cannot leave them, which hold `bound` on average; none at the mean
};

Placed find_placed(const SlotTable& slots, int64_t num_experts);

// Sum over the source ranks. A negative count would break the search and an overflow lose tokens, so both are refused,
// in words that call the counts `name`.
std::vector<int64_t> total_load(const char* name, const Counts& counts);

// What each host takes, so that the busiest rank takes as little as possible; the op min_max_split in other memory.
std::vector<int64_t> split_over_hosts(const Counts& counts, const Hosts& hosts, const std::vector<int64_t>& load_E);

// The split with the smallest possible `bound`; every expert with tokens has a host.
Balance best_balance(const Hosts& hosts, const std::vector<int64_t>& load_E, int64_t num_ranks);

// Finds the sets of ranks that limit one placement, for many loads: placement/split.py:binding_cuts.
class CutFinder {
 public:
  // peak_E is at least every load that will be asked for.
  CutFinder(const Hosts& hosts, const std::vector<int64_t>& peak_E, int64_t num_ranks);
  CutFinder(const CutFinder&) = delete;
  ~CutFinder();

  std::vector<std::vector<Index>> cuts(const int64_t* load_E) const;

 private:
  struct State;
  const std::unique_ptr<const State> state_;
};

// Throws unless the homes are every expert once.
void check_homes(const SlotTable& slots, int64_t num_experts);

// The same, and throws unless the other slots have experts or are empty.
void check_placement(const SlotTable& slots, int64_t num_experts);

// Which rank feeds each replica: placement/relay.py. The ranks lie on `num_nodes` nodes.
std::vector<Transfer> relay_transfers(const SlotTable& slots, const Placed& placed, int64_t num_nodes);

// Transfers that follow one another until every replica has its weights: placement/relay.py:steps_by_link.
struct Steps {
  int64_t inside, between;  // inside nodes, and between them
};

Steps relay_steps(const SlotTable& slots, std::vector<Transfer> transfers, int64_t num_nodes);

// What transfers cost, in tokens of the busiest rank: cost/replicas.py:TransferPrice.
class TransferPrice {
 public:
  // legs_23: of the weights, then of the gradients: a transfer inside a node, one between nodes, what is hidden of all.
  TransferPrice(const double* legs_23, int64_t num_nodes);

  int64_t num_nodes() const { return num_nodes_; }
  bool is_free() const;
  double tokens(int64_t inside, int64_t between) const;

 private:
  double legs_[2][3];
  int64_t num_nodes_;
};

// Clears the spare slots whose replicas cost more time than they save: placement/paying_replicas.py. Returns what is
// left: tokens of the busiest rank, the mean over the loads, and the price of the transfers.
double drop_losing_replicas(const Loads& loads, const SlotTable& slots, const TransferPrice& price);

// Tokens of the homes on each of so many parts of the group, ranks or nodes.
std::vector<int64_t> load_of_parts(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_parts);

// Tokens per rank that no replicas within nodes can take the busiest rank of each node below:
// placement/exact_search.py.
std::vector<int64_t> node_bounds(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes);

// Replaces replicas one at a time while the busiest rank has more than it would have to: placement/exact_search.py.
void improve_replicas(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes, int64_t trials);

// Writes the replicas that the op exact_replicas plans into the spare slots. A replica
// stays on the node of its home, of which there are `num_nodes`. The homes are each expert once.
void fill_spare_slots(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes, int64_t trials);

// Writes few large replicas into the spare slots instead: placement/spilled_replicas.py.
void spill_into_slots(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes);

// Where replicas may be, and what they cost: placement/exact_plan.py:ExactPlanOptions.
struct ExactPlanOptions {
  int64_t num_nodes;
  bool or_group;
  double limit;
  TransferPrice price;
};

// Writes the cheapest replicas for exactly these tokens into the spare slots: placement/exact_plan.py. Returns the
// nodes that they stay on, or 1 where they were planned over the group. The homes are each expert once.
int64_t plan_exact(const std::vector<int64_t>& load_E, const SlotTable& slots, const ExactPlanOptions& options);
}  // namespace smartmoe::cpu
