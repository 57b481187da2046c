// Everything between the counts' arrival and the permutation, in one call: replicas planned for exactly these tokens,
// the split over homes and replicas, the source ranks that the tokens come from, and from these the sizes of this
// rank's exchanges and the segments by which its rows move to the send order. The twin is
// megatron_smartmoe/runtime/replicas/dispatch_plan.py:plan_in_steps, which composes the steps' own twins.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"
#include "sources.h"

namespace smartmoe::cpu {
namespace {
// The slots where experts are numbered by their homes; a replica lies beside other experts.
void check_slots(const SlotTable& slots, int64_t num_experts) {
  std::vector<Index> last_rank_E(num_experts, -1);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
      const int64_t expert = slots.row(rank)[slot], home = rank * slots.home_slots + slot;
      if (slot < slots.home_slots && expert != home) {
        fail("slots_RS[", rank, ", ", slot, "] = ", expert, ": it must be ", home,
             ", since experts are numbered by their homes. Number them so");
      }
      if (expert == kEmpty) continue;
      if (expert < 0 || expert >= num_experts || last_rank_E[expert] == rank) {
        fail("slots_RS[", rank, ", ", slot, "] = ", expert, ": it must be one of the ", num_experts,
             " experts that the rank does not hold already, or -1. Pass a valid placement");
      }
      last_rank_E[expert] = static_cast<Index>(rank);
    }
  }
}

// Replicas for exactly these tokens in the first spare slots of each rank, as many as may be used; the others stay
// empty.
void plan_into(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t used_slots,
               const ExactPlanOptions& options) {
  const int64_t num_used = slots.home_slots + used_slots;
  std::vector<int64_t> used_RS(slots.num_ranks * num_used);
  const SlotTable used{used_RS.data(), slots.num_ranks, num_used, slots.home_slots};
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) std::copy_n(slots.row(rank), num_used, used.row(rank));
  plan_exact(load_E, used, options);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    std::copy_n(used.row(rank), num_used, slots.row(rank));
    std::fill(slots.row(rank) + num_used, slots.row(rank) + slots.num_slots, kEmpty);
  }
}

// Which source rank's tokens go to which host, as far as this rank is concerned.
// sent_C gets what this rank sends to each host, arriving_RS what each rank sends to each slot of this rank; tokens_C
// is what each host takes, and is used up.
void assign_own(const Counts& counts, const Placed& placed, int64_t num_slots, int64_t own, int64_t num_nodes,
                std::vector<int64_t>& tokens_C, int64_t* sent_C, int64_t* arriving_RS) {
  const Hosts& hosts = placed.hosts;
  std::fill(sent_C, sent_C + tokens_C.size(), int64_t{0});
  std::fill(arriving_RS, arriving_RS + counts.num_ranks * num_slots, int64_t{0});
  // Step 1: the experts with one host. What arrives is read row by row, as the counts lie in memory.
  std::vector<Index> own_C, own_E;
  for (int64_t expert = 0; expert < counts.num_experts; ++expert) {
    if (hosts.num_hosts(expert) != 1) continue;
    const Index c = hosts.begin_E[expert];
    sent_C[c] = counts.row(own)[expert];
    if (hosts.rank_C[c] != own) continue;
    own_C.push_back(c);
    own_E.push_back(static_cast<Index>(expert));
  }
  for (int64_t source = 0; source < counts.num_ranks; ++source) {
    for (size_t i = 0; i < own_C.size(); ++i) {
      arriving_RS[source * num_slots + placed.slot_C[own_C[i]]] = counts.row(source)[own_E[i]];
    }
  }
  // Step 2: those with several.
  const auto record = [&](int64_t source, Index c, int64_t tokens) {
    if (source == own) sent_C[c] += tokens;
    if (hosts.rank_C[c] == own) arriving_RS[source * num_slots + placed.slot_C[c]] += tokens;
  };
  Sources(counts, hosts, record).assign(tokens_C, num_nodes);
}

// The parts of the result, one behind the other: runtime/replicas/dispatch_plan.py:PlanBuffer has the same order.
struct Result {
  Result(int64_t* plan, int64_t num_ranks, int64_t tp_size, int64_t num_experts, int64_t num_slots)
      : numbers(plan),
        sent_R(numbers + kPlanNumbers),
        received_R(sent_R + num_ranks),
        homes_R(received_R + num_ranks),
        split_R(homes_R + num_ranks),
        load_E(split_R + num_ranks),
        tokens_S(load_E + num_experts),
        arriving_P(tokens_S + num_slots),
        arriving_PRS(arriving_P + tp_size),
        length_N(arriving_PRS + tp_size * num_ranks * num_slots),
        shift_N(length_N + num_ranks * num_slots),
        replicas_N5(shift_N + num_ranks * num_slots) {}

  int64_t* numbers;  // rows that this rank sends, replicas, those that take tokens, those of this rank
  int64_t *sent_R, *received_R, *homes_R, *split_R, *load_E, *tokens_S, *arriving_P, *arriving_PRS, *length_N, *shift_N,
      *replicas_N5;
};

// The lengths of this rank's segments, in the order of the experts, and how far each moves: its start in the send
// order, by rank, then slot, minus its start here.
void write_segments(const Placed& placed, const SlotTable& slots, const int64_t* sent_C, const Result& result) {
  std::vector<int64_t> begin_RS(slots.num_ranks * slots.num_slots, 0);
  const auto at = [&](size_t c) { return placed.hosts.rank_C[c] * slots.num_slots + placed.slot_C[c]; };
  const size_t num_hosts = placed.slot_C.size();
  for (size_t c = 0; c < num_hosts; ++c) begin_RS[at(c)] = sent_C[c];
  int64_t rows = 0;
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    const int64_t before = rows;
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
      const int64_t tokens = begin_RS[rank * slots.num_slots + slot];
      begin_RS[rank * slots.num_slots + slot] = rows;
      rows += tokens;
    }
    result.sent_R[rank] = rows - before;
  }
  int64_t begin = 0;
  for (size_t c = 0; c < num_hosts; ++c) {
    result.length_N[c] = sent_C[c];
    result.shift_N[c] = begin_RS[at(c)] - begin;
    begin += sent_C[c];
  }
  std::fill(result.length_N + num_hosts, result.shift_N, int64_t{0});
  std::fill(result.shift_N + num_hosts, result.replicas_N5, int64_t{0});
  result.numbers[0] = rows;
}

// Tokens for each slot of this rank, for each of the ranks that share its experts, and for this one from each rank.
void write_arriving(const SlotTable& slots, int64_t tp_size, int64_t tp_rank, const Result& result) {
  std::fill(result.tokens_S, result.arriving_PRS, int64_t{0});
  for (int64_t i = 0; i < tp_size * slots.num_ranks; ++i) {
    const int64_t* from_S = result.arriving_PRS + i * slots.num_slots;
    const int64_t rows = std::accumulate(from_S, from_S + slots.num_slots, int64_t{0});
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) result.tokens_S[slot] += from_S[slot];
    result.arriving_P[i / slots.num_ranks] += rows;
    if (i / slots.num_ranks == tp_rank) result.received_R[i % slots.num_ranks] = rows;
  }
}

// Tokens of each expert, and of each rank with the homes alone and as they were split, for the history and the log.
void write_balance(const Placed& placed, int64_t home_slots, const std::vector<int64_t>& load_E,
                   const std::vector<int64_t>& taken_C, int64_t num_ranks, const Result& result) {
  std::copy(load_E.begin(), load_E.end(), result.load_E);
  std::fill(result.homes_R, result.homes_R + num_ranks, int64_t{0});
  std::fill(result.split_R, result.split_R + num_ranks, int64_t{0});
  for (size_t expert = 0; expert < load_E.size(); ++expert) {
    result.homes_R[static_cast<int64_t>(expert) / home_slots] += load_E[expert];
  }
  result.numbers[1] = static_cast<int64_t>(taken_C.size() - load_E.size());
  result.numbers[2] = 0;
  for (size_t c = 0; c < taken_C.size(); ++c) {
    result.split_R[placed.hosts.rank_C[c]] += taken_C[c];
    result.numbers[2] += placed.slot_C[c] >= home_slots && taken_C[c] > 0;
  }
}
// The replicas that this rank holds or has the home of, by rank, then slot: expert, home rank, home slot, rank, slot.
void write_replicas(const SlotTable& slots, int64_t own, const Result& result) {
  int64_t* replica = result.replicas_N5;
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    for (int64_t slot = slots.home_slots; slot < slots.num_slots; ++slot) {
      const int64_t expert = slots.row(rank)[slot];
      if (expert == kEmpty) continue;
      const int64_t home_rank = expert / slots.home_slots;
      if (rank != own && home_rank != own) continue;
      for (const int64_t field : {expert, home_rank, expert % slots.home_slots, rank, slot - slots.home_slots}) {
        *replica++ = field;
      }
    }
  }
  result.numbers[3] = (replica - result.replicas_N5) / 5;
}
}  // namespace

void plan_dispatch(const Tensor& counts_RPE, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes,
                   int64_t rank, int64_t tp_rank, std::optional<int64_t> used_slots, int64_t scope_nodes, bool or_group,
                   double limit, const Tensor& price_23, const Tensor& plan) {
  check_plan_dispatch(counts_RPE, slots_RS, home_slots, num_nodes, rank, tp_rank, used_slots, scope_nodes, price_23,
                      plan);
  const int64_t num_ranks = counts_RPE.size(0), tp_size = counts_RPE.size(1), num_experts = counts_RPE.size(2);
  const int64_t* counts = counts_RPE.const_data_ptr<int64_t>();
  const SlotTable slots{slots_RS.mutable_data_ptr<int64_t>(), num_ranks, slots_RS.size(1), home_slots};
  const Result result(plan.mutable_data_ptr<int64_t>(), num_ranks, tp_size, num_experts, slots.num_slots);
  check_slots(slots, num_experts);
  // Step 1: the load, and the replicas that are planned for it.
  const std::vector<int64_t> load_E = total_load("counts_RPE", {counts, num_ranks * tp_size, num_experts, num_experts});
  if (used_slots) {
    plan_into(load_E, slots, *used_slots,
              {.num_nodes = scope_nodes,
               .or_group = or_group,
               .limit = limit,
               .price = TransferPrice(price_23.const_data_ptr<double>(), num_nodes)});
  }
  const Placed placed = find_placed(slots, num_experts);
  // Step 2: each expert-tensor rank splits its own tokens; what this rank sends is kept of its own ones alone.
  const size_t num_hosts = placed.slot_C.size();
  std::vector<int64_t> sent_C(num_hosts), other_C(num_hosts), taken_C(num_hosts, 0);
  for (int64_t p = 0; p < tp_size; ++p) {
    const Counts own{counts + p * num_experts, num_ranks, num_experts, tp_size * num_experts};
    std::vector<int64_t> tokens_C =
        split_over_hosts(own, placed.hosts, tp_size == 1 ? load_E : total_load("counts_RPE", own));
    for (size_t c = 0; c < num_hosts; ++c) taken_C[c] += tokens_C[c];
    int64_t* sent = p == tp_rank ? sent_C.data() : other_C.data();
    int64_t* arriving_RS = result.arriving_PRS + p * num_ranks * slots.num_slots;
    assign_own(own, placed, slots.num_slots, rank, num_nodes, tokens_C, sent, arriving_RS);
  }
  // Step 3: this rank's segments, the sizes of its exchange, and how balanced it all is.
  write_segments(placed, slots, sent_C.data(), result);
  write_arriving(slots, tp_size, tp_rank, result);
  write_balance(placed, home_slots, load_E, taken_C, num_ranks, result);
  write_replicas(slots, rank, result);
}
}  // namespace smartmoe::cpu
