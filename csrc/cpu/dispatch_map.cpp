// Stable counting sort in two passes over the choices, on one thread: the first looks the slots up and counts them, the
// second turns each slot into the next free row of it. Both go through memory in order.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
namespace {
// The table as int32, with -1 for slots that do not exist: one comparison less for each choice.
template <class Slot>
std::vector<int32_t> read_table(const Tensor& slot_of_E, int64_t num_slots) {
  const Slot* slot = slot_of_E.const_data_ptr<Slot>();
  std::vector<int32_t> table(static_cast<size_t>(slot_of_E.numel()));
  for (size_t e = 0; e < table.size(); ++e) {
    const bool exists = slot[e] >= 0 && static_cast<int64_t>(slot[e]) < num_slots;
    table[e] = exists ? static_cast<int32_t>(slot[e]) : -1;
  }
  return table;
}

// Writes the slot of each choice to slots and adds the choices up in tokens_S.
template <class Id>
void find_slots(const Tensor& ids, const std::vector<int32_t>& table, int32_t* slots, int64_t* tokens_S) {
  const Id* id = ids.const_data_ptr<Id>();
  const int64_t num_ids = ids.numel();
  for (int64_t i = 0; i < num_ids; ++i) {
    // as unsigned, a negative id is larger than any expert
    const uint64_t expert = static_cast<uint64_t>(static_cast<int64_t>(id[i]));
    const int32_t slot = expert < table.size() ? table[expert] : -1;
    slots[i] = slot;
    if (slot >= 0) ++tokens_S[slot];
  }
}
}  // namespace

std::tuple<Tensor, Tensor> dispatch_map(const Tensor& ids_TK, const Tensor& slot_of_E, int64_t num_slots) {
  check_dispatch_map(ids_TK, slot_of_E, num_slots);
  const Tensor ids = torch::stable::contiguous(ids_TK), slots = torch::stable::contiguous(slot_of_E);
  const auto table = slots.scalar_type() == ScalarType::Long ? read_table<int64_t>(slots, num_slots)
                                                             : read_table<int32_t>(slots, num_slots);
  Tensor rows_TK = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Int);
  Tensor tokens_S = torch::stable::new_zeros(ids, {num_slots}, ScalarType::Long);
  int32_t* rows = rows_TK.mutable_data_ptr<int32_t>();
  int64_t* tokens = tokens_S.mutable_data_ptr<int64_t>();
  if (ids.scalar_type() == ScalarType::Long) {
    find_slots<int64_t>(ids, table, rows, tokens);
  } else {
    find_slots<int32_t>(ids, table, rows, tokens);
  }

  std::vector<int32_t> next_row_S(static_cast<size_t>(num_slots));
  int64_t first_row = 0;
  for (int64_t s = 0; s < num_slots; ++s) {
    next_row_S[static_cast<size_t>(s)] = static_cast<int32_t>(first_row);
    first_row += tokens[s];
  }
  const int64_t num_choices = ids.numel();
  for (int64_t i = 0; i < num_choices; ++i) {
    if (rows[i] >= 0) rows[i] = next_row_S[static_cast<size_t>(rows[i])]++;
  }
  return {rows_TK, tokens_S};
}
}  // namespace smartmoe::cpu
