// The cheapest replicas for exactly the tokens of one micro-batch, the C++ twin of
// megatron_smartmoe/placement/exact_plan.py, which explains the method: same steps, same order, same choices among
// equals.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"

namespace smartmoe::cpu {
namespace {
// Whether lhs <= rhs, exactly, as Python compares an integer with a float.
bool at_most(__int128 lhs, double rhs) {
  constexpr double kTooLarge = 1.7e38;  // above it, every product of two int64 is smaller
  if (rhs >= kTooLarge) return true;
  return lhs <= static_cast<__int128>(rhs);  // rhs is not negative, so truncation rounds down
}

void clear_spare_slots(const SlotTable& slots) {
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    std::fill(slots.row(rank) + slots.home_slots, slots.row(rank) + slots.num_slots, kEmpty);
  }
}
}  // namespace

int64_t plan_exact(const std::vector<int64_t>& load_E, const SlotTable& slots, const ExactPlanOptions& options) {
  clear_spare_slots(slots);
  const double enough = options.limit * static_cast<double>(std::accumulate(load_E.begin(), load_E.end(), int64_t{0}));
  // Step 1: homes that are balanced well enough.
  const auto is_even = [&](int64_t parts) {
    const std::vector<int64_t> load_P = load_of_parts(load_E, slots, parts);
    return at_most(static_cast<__int128>(*std::max_element(load_P.begin(), load_P.end())) * parts, enough);
  };
  if (is_even(slots.num_ranks)) return options.num_nodes;
  // Step 2: within nodes, and over the group where a node has too much as a whole; both ways to plan.
  std::vector<int64_t> places{options.num_nodes};
  if (options.or_group && options.num_nodes > 1 && !is_even(options.num_nodes)) places.push_back(1);
  // One place and free transfers leave nothing to compare, so that nothing is judged.
  if (options.price.is_free() && places.size() == 1) {
    fill_spare_slots(load_E, slots, options.num_nodes, kTrials);
    return options.num_nodes;
  }
  const int64_t num_all = slots.num_ranks * slots.num_slots;
  std::vector<int64_t> best_RS(slots.data, slots.data + num_all), tried_RS(num_all);
  const SlotTable tried{tried_RS.data(), slots.num_ranks, slots.num_slots, slots.home_slots};
  double least = std::numeric_limits<double>::infinity();
  int64_t best_nodes = options.num_nodes;
  for (const int64_t num_nodes : places) {
    for (const bool spills : {false, true}) {
      std::copy_n(slots.data, num_all, tried_RS.begin());
      if (spills) {
        spill_into_slots(load_E, tried, num_nodes);
      } else {
        fill_spare_slots(load_E, tried, num_nodes, kTrials);
      }
      const double cost = drop_losing_replicas({load_E}, tried, options.price);
      if (cost < least) {
        least = cost;
        best_nodes = num_nodes;
        best_RS = tried_RS;
      }
      // the other way could save a hundredth at most
      if (options.price.is_free() || cost * static_cast<double>(slots.num_ranks) <= enough) break;
    }
  }
  std::copy(best_RS.begin(), best_RS.end(), slots.data);
  return best_nodes;
}

std::tuple<Tensor, int64_t> exact_plan(const Tensor& load_E, const Tensor& slots_RS, int64_t home_slots,
                                       int64_t scope_nodes, bool or_group, double limit, const Tensor& price_23,
                                       int64_t num_nodes) {
  check_exact_plan(load_E, slots_RS, home_slots, scope_nodes, price_23, num_nodes);
  const Tensor dense_E = torch::stable::contiguous(load_E), dense_RS = torch::stable::contiguous(slots_RS);
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = load_E.size(0);
  Tensor new_RS = torch::stable::new_empty(dense_RS, {num_ranks, num_slots});
  const SlotTable slots{new_RS.mutable_data_ptr<int64_t>(), num_ranks, num_slots, home_slots};
  std::copy_n(dense_RS.const_data_ptr<int64_t>(), num_ranks * num_slots, slots.data);
  const Counts counts{dense_E.const_data_ptr<int64_t>(), 1, num_experts, num_experts};
  const std::vector<int64_t> load = total_load("load_E", counts);
  check_homes(slots, num_experts);
  const int64_t nodes = plan_exact(load, slots,
                                   {.num_nodes = scope_nodes,
                                    .or_group = or_group,
                                    .limit = limit,
                                    .price = TransferPrice(price_23.const_data_ptr<double>(), num_nodes)});
  return {new_RS, nodes};
}
}  // namespace smartmoe::cpu
