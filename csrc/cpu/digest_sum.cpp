// The digest of a checkpoint's numbers (megatron_smartmoe/checkpoint/digest.py), at the speed of memory: a save waits
// for it. numpy passes over an element nine times.
#include <cstdint>

#include "../checks.h"
#include "../ops.h"

namespace smartmoe::cpu {
namespace {
constexpr uint64_t kPosition = 0x9E3779B97F4A7C15, kMix = 0x94D049BB133111EB;
constexpr int kShift = 32;

// Products of 64-bit numbers are four times as fast in vectors, for which this file is compiled once for each
// generation of processors; the loader picks one (before a sanitizer is ready for it).
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define SMARTMOE_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SMARTMOE_FOR_EACH_CPU
#endif

#define SMARTMOE_ROW_SUM(name, Bits)                                                                      \
  SMARTMOE_FOR_EACH_CPU uint64_t name(const Bits* bits, int64_t width, uint64_t first, uint64_t factor) { \
    uint64_t sum = 0;                                                                                     \
    for (int64_t i = 0; i < width; ++i) {                                                                 \
      uint64_t x = first + static_cast<uint64_t>(i) * kPosition + bits[i] * factor;                       \
      x = (x ^ (x >> kShift)) * kMix;                                                                     \
      sum += x ^ (x >> kShift);                                                                           \
    }                                                                                                     \
    return sum;                                                                                           \
  }
SMARTMOE_ROW_SUM(sum_of_row_8, uint8_t)
SMARTMOE_ROW_SUM(sum_of_row_16, uint16_t)
SMARTMOE_ROW_SUM(sum_of_row_32, uint32_t)
SMARTMOE_ROW_SUM(sum_of_row_64, uint64_t)

template <class Bits>
uint64_t sum_of_rows(const Tensor& bits_N, const Tensor& positions_L, int64_t width, uint64_t factor,
                     uint64_t (*sum_of_row)(const Bits*, int64_t, uint64_t, uint64_t)) {
  const Bits* bits = static_cast<const Bits*>(bits_N.const_data_ptr());
  const int64_t* positions = positions_L.const_data_ptr<int64_t>();
  uint64_t sum = 0;
  for (int64_t row = 0; row < positions_L.size(0); ++row) {
    const uint64_t first = (static_cast<uint64_t>(positions[row]) + 1) * kPosition;
    sum += sum_of_row(bits + row * width, width, first, factor);
  }
  return sum;
}
}  // namespace

int64_t digest_sum(const Tensor& bits_N, const Tensor& positions_L, int64_t width, int64_t value_factor) {
  check_digest_sum(bits_N, positions_L, width);
  const uint64_t factor = static_cast<uint64_t>(value_factor);
  uint64_t sum = 0;
  switch (bits_N.scalar_type()) {
    case ScalarType::Byte: sum = sum_of_rows<uint8_t>(bits_N, positions_L, width, factor, &sum_of_row_8); break;
    case ScalarType::Short: sum = sum_of_rows<uint16_t>(bits_N, positions_L, width, factor, &sum_of_row_16); break;
    case ScalarType::Int: sum = sum_of_rows<uint32_t>(bits_N, positions_L, width, factor, &sum_of_row_32); break;
    default: sum = sum_of_rows<uint64_t>(bits_N, positions_L, width, factor, &sum_of_row_64); break;
  }
  return static_cast<int64_t>(sum);
}
}  // namespace smartmoe::cpu
