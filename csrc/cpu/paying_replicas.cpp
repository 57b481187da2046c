// Which replicas pay, the C++ twin of megatron_smartmoe/placement/paying_replicas.py:without_losing_replicas, which
// explains the method: same steps, same order, same choices among equals.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
constexpr int64_t kOneByOne = 32;  // paying_replicas.py:_ONE_BY_ONE
constexpr double kAtMost = 0.75;   // paying_replicas.py:_AT_MOST
constexpr int64_t kParts = 8;      // paying_replicas.py:_PARTS

double price_of(const SlotTable& slots, int64_t num_experts, const TransferPrice& price) {
  const Placed placed = find_placed(slots, num_experts);
  const Steps steps = relay_steps(slots, relay_transfers(slots, placed, price.num_nodes()), price.num_nodes());
  return price.tokens(steps.inside, steps.between);
}

// A slot table judged on all loads.
class Judged {
 public:
  Judged(const Loads& loads, const SlotTable& shape, std::vector<int64_t> slots_RS, const TransferPrice& price)
      : slots_RS_(std::move(slots_RS)),
        table_{slots_RS_.data(), shape.num_ranks, shape.num_slots, shape.home_slots},
        taken_RS_(slots_RS_.size(), 0.0) {
    const Placed placed = find_placed(table_, static_cast<int64_t>(loads.front().size()));
    for (const std::vector<int64_t>& load_E : loads) {
      const Balance balance = best_balance(placed.hosts, load_E, shape.num_ranks);
      busiest_ += static_cast<double>(balance.bound) / static_cast<double>(loads.size());
      for (size_t c = 0; c < balance.tokens_C.size(); ++c) {
        taken_RS_[placed.hosts.rank_C[c] * shape.num_slots + placed.slot_C[c]] +=
            static_cast<double>(balance.tokens_C[c]);
      }
    }
    const Steps steps = relay_steps(table_, relay_transfers(table_, placed, price.num_nodes()), price.num_nodes());
    transfers_ = price.tokens(steps.inside, steps.between);
  }
  Judged(Judged&&) = default;
  Judged& operator=(Judged&&) = default;

  double busiest() const { return busiest_; }
  double transfers() const { return transfers_; }  // their price
  double cost() const { return busiest_ + transfers_; }
  const std::vector<int64_t>& slots_RS() const { return slots_RS_; }

  // The slots without the smallest replicas, as many as it takes until the transfers cost less.
  std::vector<int64_t> with_cheaper_transfers(int64_t num_experts, const TransferPrice& price) const {
    std::vector<int64_t> smallest_first;  // the filled spare slots
    for (int64_t rank = 0; rank < table_.num_ranks; ++rank) {
      for (int64_t slot = table_.home_slots; slot < table_.num_slots; ++slot) {
        const int64_t at = rank * table_.num_slots + slot;
        if (slots_RS_[at] != kEmpty) smallest_first.push_back(at);
      }
    }
    std::stable_sort(smallest_first.begin(), smallest_first.end(),
                     [&](int64_t a, int64_t b) { return taken_RS_[a] < taken_RS_[b]; });
    std::vector<int64_t> fewer_RS = slots_RS_;
    const SlotTable fewer{fewer_RS.data(), table_.num_ranks, table_.num_slots, table_.home_slots};
    const int64_t filled = static_cast<int64_t>(smallest_first.size());
    const int64_t at_once = filled <= kOneByOne ? 1 : filled / kParts;
    // Step 1: drop.
    double transfers = transfers_;
    int64_t dropped = 0;
    while (transfers >= transfers_ || (at_once > 1 && transfers > kAtMost * transfers_)) {
      const int64_t stop = std::min(dropped + at_once, filled);
      for (; dropped < stop; ++dropped) fewer_RS[smallest_first[dropped]] = kEmpty;
      transfers = price_of(fewer, num_experts, price);
    }
    // Step 2: put back what costs nothing.
    for (int64_t i = dropped - 2; at_once == 1 && i >= 0; --i) {
      const int64_t at = smallest_first[i];
      fewer_RS[at] = slots_RS_[at];
      if (price_of(fewer, num_experts, price) > transfers) fewer_RS[at] = kEmpty;
    }
    return fewer_RS;
  }

 private:
  std::vector<int64_t> slots_RS_;  // its memory is the table's
  SlotTable table_;
  std::vector<double> taken_RS_;  // tokens of all loads together
  double busiest_ = 0.0;          // mean over the loads
  double transfers_;
};
}  // namespace

TransferPrice::TransferPrice(const double* legs_23, int64_t num_nodes) : num_nodes_(num_nodes) {
  std::copy_n(legs_23, 6, &legs_[0][0]);
}

bool TransferPrice::is_free() const {
  return !(legs_[0][0] > 0 || legs_[0][1] > 0 || legs_[1][0] > 0 || legs_[1][1] > 0);
}

double TransferPrice::tokens(int64_t inside, int64_t between) const {
  double sum = 0.0;
  for (const double* leg : legs_) {
    sum += std::max(0.0, static_cast<double>(inside) * leg[0] + static_cast<double>(between) * leg[1] - leg[2]);
  }
  return sum;
}

double drop_losing_replicas(const Loads& loads, const SlotTable& slots, const TransferPrice& price) {
  const int64_t num_all = slots.num_ranks * slots.num_slots;
  const int64_t num_experts = static_cast<int64_t>(loads.front().size());
  Judged judged(loads, slots, {slots.data, slots.data + num_all}, price);
  if (price.is_free()) return judged.cost();
  std::vector<int64_t> best_RS = judged.slots_RS();
  double best = judged.cost();
  // Step 1: drop the smallest replicas until their transfers cost less, as long as that can pay.
  while (judged.transfers() > 0 && judged.busiest() < best) {
    judged = Judged(loads, slots, judged.with_cheaper_transfers(num_experts, price), price);
    if (judged.cost() < best) {
      best = judged.cost();
      best_RS = judged.slots_RS();
    }
  }
  // Step 2: no replicas at all may be cheaper still.
  std::vector<int64_t> bare_RS(slots.data, slots.data + num_all);
  for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
    int64_t* row = bare_RS.data() + rank * slots.num_slots;
    std::fill(row + slots.home_slots, row + slots.num_slots, kEmpty);
  }
  double bare = 0.0;
  for (const std::vector<int64_t>& load_E : loads) {
    int64_t busiest = 0;
    for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
      int64_t load = 0;
      for (int64_t slot = 0; slot < slots.home_slots; ++slot) load += load_E[bare_RS[rank * slots.num_slots + slot]];
      busiest = std::max(busiest, load);
    }
    bare += static_cast<double>(busiest) / static_cast<double>(loads.size());
  }
  std::copy_n(bare <= best ? bare_RS.data() : best_RS.data(), num_all, slots.data);
  return std::min(bare, best);
}

Tensor paying_replicas(const Tensor& loads_KE, const Tensor& slots_RS, int64_t home_slots, const Tensor& price_23,
                       int64_t num_nodes) {
  check_paying_replicas(loads_KE, slots_RS, home_slots, price_23, num_nodes);
  const Tensor dense_KE = torch::stable::contiguous(loads_KE), dense_RS = torch::stable::contiguous(slots_RS);
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = loads_KE.size(1);
  const int64_t* load = dense_KE.const_data_ptr<int64_t>();
  Loads loads;
  for (int64_t k = 0; k < loads_KE.size(0); ++k, load += num_experts) {
    total_load("loads_KE",
               {load, 1, num_experts, num_experts});  // throws where a count is negative or the sum overflows
    loads.emplace_back(load, load + num_experts);
  }
  Tensor new_RS = torch::stable::new_empty(dense_RS, {num_ranks, num_slots});
  int64_t* out = new_RS.mutable_data_ptr<int64_t>();
  std::copy_n(dense_RS.const_data_ptr<int64_t>(), num_ranks * num_slots, out);
  const SlotTable slots{out, num_ranks, num_slots, home_slots};
  check_placement(slots, num_experts);
  drop_losing_replicas(loads, slots, TransferPrice(price_23.const_data_ptr<double>(), num_nodes));
  return new_RS;
}
}  // namespace smartmoe::cpu
