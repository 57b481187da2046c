// Replicas from the exact load, the C++ twin of megatron_smartmoe/placement/exact_replicas.py, which explains the
// method: same steps, same order, same choices among equals. Only the state is kept differently: flat vectors for
// dictionaries, the donors kept sorted instead of sorted anew, and the largest expert of each rank remembered.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
using Gap = std::pair<int64_t, int64_t>;  // tokens missing to the mean (negative: surplus), rank

struct Choice {
  int64_t donor, receiver, expert, tokens;
};

// What is computed in a filled slot.
struct Slot {
  int64_t expert, tokens;
};

void insert_sorted(std::vector<Gap>& gaps, Gap gap) {
  gaps.insert(std::upper_bound(gaps.begin(), gaps.end(), gap), gap);
}

void remove_sorted(std::vector<Gap>& gaps, Gap gap) {
  gaps.erase(std::lower_bound(gaps.begin(), gaps.end(), gap));
}

// The pass over one node: tokens by rank and expert as they would be computed, free slots, replicas.
class Filling {
 public:
  // slots_RS starts at the node's first rank; home_rank_E is scratch of E entries, written for the node's experts.
  Filling(const int64_t* load_E, const int64_t* slots_RS, int64_t num_ranks, int64_t num_slots, int64_t home_slots,
          std::vector<int64_t>& home_rank_E)
      : num_ranks_(num_ranks),
        num_slots_(num_slots),
        home_slots_(home_slots),
        home_rank_E_(home_rank_E),
        filled_RS_(num_ranks * num_slots),
        num_filled_R_(num_ranks, home_slots),
        load_R_(num_ranks, 0),
        largest_R_(num_ranks) {
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
      for (int64_t slot = 0; slot < home_slots; ++slot) {
        const int64_t expert = slots_RS[rank * num_slots + slot];
        filled_RS_[rank * num_slots + slot] = {expert, load_E[expert]};
        home_rank_E_[expert] = rank;
        load_R_[rank] += load_E[expert];
      }
      find_largest(rank);
    }
  }

  // Adds replicas until no rank is above `mean` or no slot helps; returns whether no rank is above it.
  bool run(int64_t mean) {
    mean_ = mean;
    for (int64_t rank = 0; rank < num_ranks_; ++rank) {
      if (load_R_[rank] < mean && is_free(rank)) gaps_.emplace_back(mean - load_R_[rank], rank);
      if (load_R_[rank] > mean) donors_.emplace_back(mean - load_R_[rank], rank);
    }
    std::sort(gaps_.begin(), gaps_.end());
    std::sort(donors_.begin(), donors_.end());
    while (!gaps_.empty()) {
      std::optional<Choice> choice = fills();
      if (!choice) choice = overfills();
      if (!choice) choice = part();
      if (!choice) break;
      give(*choice);
    }
    return donors_.empty();
  }

  // Writes the replicas into the spare slots; new_RS starts at the node's first rank.
  void write(int64_t* new_RS) const {
    for (int64_t rank = 0; rank < num_ranks_; ++rank) {
      for (int64_t slot = home_slots_; slot < num_slots_; ++slot) {
        const int64_t at = rank * num_slots_ + slot;
        new_RS[at] = slot < num_filled_R_[rank] ? filled_RS_[at].expert : kEmpty;
      }
    }
  }

 private:
  bool is_free(int64_t rank) const { return num_filled_R_[rank] < num_slots_; }

  bool holds(int64_t rank, int64_t expert) const {
    if (home_rank_E_[expert] == rank) return true;
    const Slot* filled_S = &filled_RS_[rank * num_slots_];
    for (int64_t slot = home_slots_; slot < num_filled_R_[rank]; ++slot) {
      if (filled_S[slot].expert == expert) return true;
    }
    return false;
  }

  // The slot with the most tokens of a rank, of equal ones that of the lowest expert.
  void find_largest(int64_t rank) {
    const Slot* filled_S = filled_RS_.data() + rank * num_slots_;
    int64_t best = 0;
    for (int64_t slot = 1; slot < num_filled_R_[rank]; ++slot) {
      const bool more = filled_S[slot].tokens > filled_S[best].tokens;
      const bool equal = filled_S[slot].tokens == filled_S[best].tokens;
      if (more || (equal && filled_S[slot].expert < filled_S[best].expert)) best = slot;
    }
    largest_R_[rank] = best;
  }

  const Slot& largest(int64_t donor) const { return filled_RS_[donor * num_slots_ + largest_R_[donor]]; }

  // A donor (the highest first) whose surplus fills a gap: the largest such gap.
  std::optional<Choice> fills() const {
    for (const auto& [missing, donor] : donors_) {
      const auto [expert, tokens] = largest(donor);
      const Gap limit{std::min(-missing, tokens), num_ranks_};
      for (auto gap = std::upper_bound(gaps_.begin(), gaps_.end(), limit); gap != gaps_.begin();) {
        --gap;
        if (!holds(gap->second, expert)) return Choice{donor, gap->second, expert, gap->first};
      }
    }
    return std::nullopt;
  }

  // A donor with a free slot of its own that fills a gap with more than its surplus, by as little as possible.
  std::optional<Choice> overfills() const {
    std::optional<Choice> best;
    int64_t least = 0;
    for (const auto& [missing, donor] : donors_) {
      if (!is_free(donor)) continue;
      const auto [expert, tokens] = largest(donor);
      for (const auto& [gap, receiver] : gaps_) {
        if (gap > tokens || (best && gap + missing >= least)) break;
        if (holds(receiver, expert)) continue;
        best = Choice{donor, receiver, expert, gap};
        least = gap + missing;
        break;
      }
    }
    return best;
  }

  // As many tokens as one replica can take off a donor for a gap that stays open: the whole expert if the donor has a
  // free slot, else its surplus.
  std::optional<Choice> part() const {
    std::optional<Choice> best;
    int64_t most = 0;
    for (const auto& [missing, donor] : donors_) {
      const auto [expert, tokens] = largest(donor);
      const int64_t given = is_free(donor) ? tokens : std::min(-missing, tokens);
      if (best && given <= most) continue;
      for (auto gap = gaps_.rbegin(); gap != gaps_.rend(); ++gap) {
        if (holds(gap->second, expert)) continue;
        best = Choice{donor, gap->second, expert, std::min(given, gap->first)};
        most = given;
        break;
      }
    }
    return best;
  }

  void give(const Choice& choice) {
    const auto [donor, receiver, expert, tokens] = choice;
    remove_sorted(gaps_, {mean_ - load_R_[receiver], receiver});
    remove_sorted(donors_, {mean_ - load_R_[donor], donor});
    filled_RS_[donor * num_slots_ + largest_R_[donor]].tokens -= tokens;
    filled_RS_[receiver * num_slots_ + num_filled_R_[receiver]++] = {expert, tokens};
    load_R_[donor] -= tokens;
    load_R_[receiver] += tokens;
    for (const int64_t rank : {donor, receiver}) {
      find_largest(rank);
      if (load_R_[rank] < mean_ && is_free(rank)) insert_sorted(gaps_, {mean_ - load_R_[rank], rank});
    }
    // no receiver becomes a donor: it is given at most what is missing
    if (load_R_[donor] > mean_) insert_sorted(donors_, {mean_ - load_R_[donor], donor});
  }

  const int64_t num_ranks_, num_slots_, home_slots_;
  int64_t mean_ = 0;
  std::vector<int64_t>& home_rank_E_;
  std::vector<Slot> filled_RS_;  // the homes, then the replicas in the order they were made
  std::vector<int64_t> num_filled_R_, load_R_, largest_R_;
  std::vector<Gap> gaps_;    // of the receivers, ascending
  std::vector<Gap> donors_;  // the highest load first
};

// Checks the values, on which the indices of the pass rest.
void check_values(const int64_t* load_E, int64_t num_experts, const int64_t* slots_RS, int64_t num_ranks,
                  int64_t num_slots, int64_t home_slots) {
  uint64_t total = 0;
  bool overflows = false;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (load_E[expert] < 0) {
      fail("load_E[", expert, "] = ", load_E[expert], ": a number of tokens is at least 0. Pass counts of tokens");
    }
    total += static_cast<uint64_t>(load_E[expert]);
    overflows |= total > static_cast<uint64_t>(kMaxTokens);
  }
  if (overflows) fail_overflow("load_E");
  check_homes({const_cast<int64_t*>(slots_RS), num_ranks, num_slots, home_slots}, num_experts);
}
}  // namespace

void check_homes(const SlotTable& slots, int64_t num_experts) {
  std::vector<bool> seen_E(num_experts, false);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    for (int64_t slot = 0; slot < slots.home_slots; ++slot) {
      const int64_t expert = slots.row(rank)[slot];
      if (expert < 0 || expert >= num_experts || seen_E[expert]) {
        fail("slots_RS[", rank, ", ", slot, "] = ", expert, ": the homes must be each of the ", num_experts,
             " experts once. Pass a valid placement");
      }
      seen_E[expert] = true;
    }
  }
}

void check_placement(const SlotTable& slots, int64_t num_experts) {
  check_homes(slots, num_experts);
  for (int64_t at = 0; at < slots.num_ranks * slots.num_slots; ++at) {
    if (slots.data[at] >= kEmpty && slots.data[at] < num_experts) continue;
    fail("slots_RS[", at / slots.num_slots, ", ", at % slots.num_slots, "] = ", slots.data[at],
         ": it must be one of the ", num_experts, " experts, or -1. Pass a valid placement");
  }
}

void fill_spare_slots(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes, int64_t trials) {
  const int64_t per_node = slots.num_ranks / num_nodes;
  const std::vector<int64_t> bound_N = node_bounds(load_E, slots, num_nodes);
  std::vector<int64_t> home_rank_E(slots.num_ranks * slots.home_slots, -1);
  bool is_even = true;
  for (int64_t node = 0; node < num_nodes; ++node) {
    int64_t* first = slots.row(node * per_node);
    Filling filling(load_E.data(), first, per_node, slots.num_slots, slots.home_slots, home_rank_E);
    is_even = filling.run(bound_N[node]) && is_even;
    filling.write(first);
  }
  if (!is_even) improve_replicas(load_E, slots, num_nodes, trials);
}

Tensor exact_replicas(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots, int64_t num_nodes,
                      int64_t trials) {
  check_replicas(load_E, slots_RS, home_slots, num_nodes, trials);
  const Tensor dense_E = torch::stable::contiguous(load_E);
  const Tensor dense_RS = torch::stable::contiguous(slots_RS);
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = load_E.size(0);
  const int64_t* load = dense_E.const_data_ptr<int64_t>();
  const int64_t* slots = dense_RS.const_data_ptr<int64_t>();
  check_values(load, num_experts, slots, num_ranks, num_slots, home_slots);

  Tensor new_RS = torch::stable::new_empty(dense_RS, {num_ranks, num_slots});
  int64_t* out = new_RS.mutable_data_ptr<int64_t>();
  std::copy(slots, slots + num_ranks * num_slots, out);
  fill_spare_slots({load, load + num_experts}, {out, num_ranks, num_slots, home_slots}, num_nodes, trials);
  return new_RS;
}
}  // namespace smartmoe::cpu
