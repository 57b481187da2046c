// The local search behind the greedy pass of exact_replicas.cpp, the C++ twin of
// megatron_smartmoe/placement/exact_search.py, which explains the method: same steps, same order, same choices among
// equals.
#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
constexpr size_t kExperts = 4, kSlots = 8;  // candidates of a step
constexpr int64_t kEnough = 1000;           // stop within a thousandth of the bound that no replicas could beat

struct SpareSlot {
  int64_t rank, slot;
};

// The state of the search.
class Search {
 public:
  Search(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes)
      : load_E_(load_E), slots_(slots), per_node_(slots.num_ranks / num_nodes), node_E_(load_E.size()) {
    const std::vector<int64_t> bound_N = node_bounds(load_E, slots, num_nodes);
    target_ = *std::max_element(bound_N.begin(), bound_N.end());
    for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
      for (int64_t slot = 0; slot < slots.home_slots; ++slot) {
        node_E_[slots.row(rank)[slot]] = rank / per_node_;
      }
    }
    evaluate();
  }

  bool is_done() const { return balance_.bound - target_ <= target_ / kEnough; }

  // Tries the candidates of one step; returns whether one of them was better and is made.
  bool step(int64_t& trials) {
    inside_R_.assign(slots_.num_ranks, 0);
    for (const Index rank : balance_.cut) inside_R_[rank] = 1;
    const std::vector<SpareSlot> cheap = cheap_slots();
    for (const int64_t expert : wanted_experts()) {
      for (const auto& [rank, slot] : cheap) {
        if (trials == 0) return false;
        if (node_E_[expert] != rank / per_node_ || holds(rank, expert)) continue;
        --trials;
        if (replace(slots_.row(rank)[slot], expert)) return true;
      }
    }
    return false;
  }

 private:
  void evaluate() {
    placed_ = find_placed(slots_, static_cast<int64_t>(load_E_.size()));
    balance_ = best_balance(placed_.hosts, load_E_, slots_.num_ranks);
  }

  bool holds(int64_t rank, int64_t expert) const {
    const int64_t* row = slots_.row(rank);
    return std::find(row, row + slots_.num_slots, expert) != row + slots_.num_slots;
  }

  // Puts the expert into the slot; takes it back if the busiest rank is no better off.
  bool replace(int64_t& slot, int64_t expert) {
    const int64_t before = std::exchange(slot, expert);
    Placed placed = std::exchange(placed_, {});
    Balance balance = std::exchange(balance_, {});
    evaluate();
    if (balance_.bound < balance.bound) return true;
    slot = before;
    placed_ = std::move(placed);
    balance_ = std::move(balance);
    return false;
  }

  // Experts that cannot leave the cut, the largest first.
  std::vector<int64_t> wanted_experts() const {
    std::vector<int64_t> wanted;
    const Hosts& hosts = placed_.hosts;
    for (size_t expert = 0; expert < load_E_.size(); ++expert) {
      const auto first = hosts.rank_C.begin() + hosts.begin_E[expert],
                 end = hosts.rank_C.begin() + hosts.begin_E[expert + 1];
      if (load_E_[expert] > 0 && std::all_of(first, end, [&](Index rank) { return inside_R_[rank] != 0; })) {
        wanted.push_back(static_cast<int64_t>(expert));
      }
    }
    const size_t count = std::min(kExperts, wanted.size());
    std::partial_sort(wanted.begin(), wanted.begin() + count, wanted.end(),
                      [&](int64_t a, int64_t b) { return load_E_[a] != load_E_[b] ? load_E_[a] > load_E_[b] : a < b; });
    wanted.resize(count);
    return wanted;
  }

  // Spare slots outside the cut, on its nodes: empty ones first, then those whose replica takes the fewest tokens.
  std::vector<SpareSlot> cheap_slots() const {
    std::vector<uint8_t> inside_N(slots_.num_ranks / per_node_, 0);
    for (const Index rank : balance_.cut) inside_N[rank / per_node_] = 1;
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> found;  // tokens, load of the rank, rank, slot
    for (int64_t rank = 0; rank < slots_.num_ranks; ++rank) {
      if (inside_R_[rank] || !inside_N[rank / per_node_]) continue;
      for (int64_t slot = slots_.home_slots; slot < slots_.num_slots; ++slot) {
        found.emplace_back(tokens_at(rank, slots_.row(rank)[slot]), balance_.load_R[rank], rank, slot);
      }
    }
    const size_t count = std::min(kSlots, found.size());
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    std::vector<SpareSlot> cheap;
    for (size_t i = 0; i < count; ++i) cheap.push_back({std::get<2>(found[i]), std::get<3>(found[i])});
    return cheap;
  }

  // Tokens that the rank takes of the expert; -1 of none.
  int64_t tokens_at(int64_t rank, int64_t expert) const {
    if (expert == kEmpty) return -1;
    Index c = placed_.hosts.begin_E[expert];
    while (placed_.hosts.rank_C[c] != rank) ++c;
    return balance_.tokens_C[c];
  }

  const std::vector<int64_t>& load_E_;
  const SlotTable slots_;
  const int64_t per_node_;
  int64_t target_ = 0;
  std::vector<int64_t> node_E_;
  std::vector<uint8_t> inside_R_;
  Placed placed_;
  Balance balance_;
};
}  // namespace

Placed find_placed(const SlotTable& slots, int64_t num_experts) {
  Placed placed;
  std::vector<Index>& begin_E = placed.hosts.begin_E;
  begin_E.assign(num_experts + 1, 0);
  const int64_t num_all = slots.num_ranks * slots.num_slots;
  for (int64_t i = 0; i < num_all; ++i) {
    if (slots.data[i] != kEmpty) ++begin_E[slots.data[i] + 1];
  }
  std::partial_sum(begin_E.begin(), begin_E.end(), begin_E.begin());
  placed.hosts.rank_C.resize(begin_E.back());
  placed.slot_C.resize(begin_E.back());
  std::vector<Index> next_E(begin_E.begin(), begin_E.end() - 1);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
      const int64_t expert = slots.row(rank)[slot];
      if (expert == kEmpty) continue;
      const Index c = next_E[expert]++;
      placed.hosts.rank_C[c] = static_cast<Index>(rank);
      placed.slot_C[c] = static_cast<Index>(slot);
    }
  }
  return placed;
}

std::vector<int64_t> load_of_parts(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_parts) {
  std::vector<int64_t> load_P(num_parts, 0);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    int64_t& load = load_P[rank * num_parts / slots.num_ranks];
    for (int64_t slot = 0; slot < slots.home_slots; ++slot) load += load_E[slots.row(rank)[slot]];
  }
  return load_P;
}

std::vector<int64_t> node_bounds(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes) {
  std::vector<int64_t> bound_N = load_of_parts(load_E, slots, num_nodes);
  const int64_t mean = ceil_div(std::accumulate(bound_N.begin(), bound_N.end(), int64_t{0}), slots.num_ranks);
  for (int64_t& bound : bound_N) bound = std::max(mean, ceil_div(bound, slots.num_ranks / num_nodes));
  return bound_N;
}

void improve_replicas(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes, int64_t trials) {
  if (trials == 0 || slots.num_slots == slots.home_slots || load_E.empty()) return;
  Search search(load_E, slots, num_nodes);
  while (trials > 0 && !search.is_done() && search.step(trials)) {
  }
}
}  // namespace smartmoe::cpu
