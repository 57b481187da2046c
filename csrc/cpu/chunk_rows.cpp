// Where each row goes when chunks of rows in the order (source, slot) are sorted by slot, and the way back.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
std::tuple<Tensor, Tensor> chunk_rows(const Tensor& counts_QS, int64_t num_rows) {
  check_chunk_rows(counts_QS, num_rows);
  const Tensor dense = torch::stable::contiguous(counts_QS);
  const int64_t num_sources = dense.size(0), num_slots = dense.size(1);
  const int64_t* counts = dense.const_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (counts[i] < 0) fail("counts_QS has ", counts[i], ": it must not be negative. Pass counts of rows");
    total += counts[i] > num_rows ? num_rows + 1 : counts[i];  // a sum that is too large already stays so
    if (total > num_rows) break;
  }
  if (total != num_rows) fail("num_rows = ", num_rows, ": it must be the sum of counts_QS. Pass the number of rows");
  Tensor to_slots_N = torch::stable::new_empty(dense, {num_rows}, ScalarType::Int);
  Tensor to_sources_N = torch::stable::new_empty(dense, {num_rows}, ScalarType::Int);
  int32_t* to_slots = to_slots_N.mutable_data_ptr<int32_t>();
  int32_t* to_sources = to_sources_N.mutable_data_ptr<int32_t>();
  std::vector<int64_t> first(static_cast<size_t>(dense.numel()));  // of each chunk's rows, as they arrive
  int64_t row = 0;
  for (size_t i = 0; i < first.size(); ++i) {
    first[i] = row;
    row += counts[i];
  }
  row = 0;
  for (int64_t s = 0; s < num_slots; ++s) {
    for (int64_t q = 0; q < num_sources; ++q) {
      const int64_t chunk = q * num_slots + s, begin = first[static_cast<size_t>(chunk)];
      for (int64_t i = 0; i < counts[chunk]; ++i, ++row) {
        to_slots[begin + i] = static_cast<int32_t>(row);
        to_sources[row] = static_cast<int32_t>(begin + i);
      }
    }
  }
  return {to_slots_N, to_sources_N};
}
}  // namespace smartmoe::cpu
