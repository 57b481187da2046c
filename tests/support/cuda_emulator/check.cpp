// Runs the kernels of csrc/cuda and their launchers on the CPU and compares with loops that define what they do.
// Without torch, so that it can be built with a sanitizer.
//
//   check OP SEEDS [MUTANT]     OP: dispatch_map, exact_split, permute, unpermute, backward, swiglu, groups, chosen,
//                               chunks or all; SEEDS: orders of the threads;
//                               MUTANT: the deliberate bug that is switched on, none by default
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <random>
#include <string>

#include "launchers.h"

using namespace smartmoe::cuda;

namespace {
const Stream kStream{.device = 0, .handle = nullptr};

#define EXPECT(condition)                                                                                       \
  if (!(condition)) {                                                                                           \
    std::printf("WRONG line %d, seed %d: %s\n", __LINE__, static_cast<int>(cuda_emulator::seed()), #condition); \
    std::exit(1);                                                                                               \
  }

// Exactly `count` elements up to the end of an allocation, so that a sanitizer sees one too many; full of garbage; not
// a multiple of 16 bytes away from it when `offset` elements lie before.
template <class T>
class Array {
 public:
  explicit Array(size_t count, size_t offset = 0) : count_(count), offset_(offset) {
    if (posix_memalign(&memory_, 16, (count + offset) * sizeof(T) + (count + offset == 0)) != 0) std::abort();
    std::memset(memory_, 0x5A, (count + offset) * sizeof(T));
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  T* data() const { return static_cast<T*>(memory_) + offset_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data()[i]; }

 private:
  void* memory_ = nullptr;
  size_t count_, offset_;
};

using Random = std::mt19937;

int64_t below(Random& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
}

// only: the expert that all tokens choose, or -1 for any.
template <class Id>
void check_dispatch_map(int64_t num_choices, int num_experts, int num_slots, int num_tiles, int only = -1) {
  Random random(11);
  Array<Id> ids(static_cast<size_t>(num_choices)), slot_of(static_cast<size_t>(num_experts));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<Id>(only >= 0 ? only : below(random, num_experts + 2) - 1);
  for (int e = 0; e < num_experts; ++e)
    slot_of[static_cast<size_t>(e)] = static_cast<Id>((e * 7 + 3) % (num_slots + 1) - (e % 5 == 4 ? 1 : 0));
  if (num_tiles == 0) num_tiles = dispatch_map_num_tiles(num_choices);
  const auto slots = static_cast<size_t>(num_slots);
  Array<uint32_t> tile_counts(static_cast<size_t>(num_tiles) * slots);
  Array<int32_t> rows(ids.size());
  Array<int64_t> tokens(slots);
  const DispatchMapArgs args{
      .ids_TK = {.data = ids.data(), .is_int64 = sizeof(Id) == 8},
      .num_choices = num_choices,
      .slot_of_E = {.data = slot_of.data(), .is_int64 = sizeof(Id) == 8},
      .num_experts = num_experts,
      .num_slots = num_slots,
      .num_tiles = num_tiles,
      .tile_counts = tile_counts.data(),
      .rows_TK = rows.data(),
      .tokens_S = tokens.data(),
  };
  EXPECT(launch_dispatch_map(args, kStream) == nullptr);
  int32_t next_row = 0;
  for (int s = 0; s < num_slots; ++s) {
    const int32_t first_row = next_row;
    for (size_t i = 0; i < ids.size(); ++i) {
      const bool known = ids[i] >= 0 && ids[i] < num_experts;
      if (known && slot_of[static_cast<size_t>(ids[i])] == s) EXPECT(rows[i] == next_row++);
    }
    EXPECT(tokens[static_cast<size_t>(s)] == next_row - first_row);
  }
  int32_t kept = 0;
  for (size_t i = 0; i < rows.size(); ++i) kept += rows[i] != -1;
  EXPECT(kept == next_row);
}

float value(float x) {
  return x;
}
float value(__half x) {
  return __half2float(x);
}
float value(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
void set(float& to, float x) {
  to = x;
}
void set(__half& to, float x) {
  to = __float2half_rn(x);
}
void set(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}
template <class T>
constexpr FloatType kType = std::is_same_v<T, float>    ? FloatType::kFloat32
                            : std::is_same_v<T, __half> ? FloatType::kFloat16
                                                        : FloatType::kBFloat16;

// Tokens, their choices and rows: the map has dropped and foreign rows, and some rows that no choice names.
struct Shape {
  int64_t tokens;
  int choices;
  int64_t hidden;
  size_t offset = 0;  // elements that the buffers of rows are away from 16-byte alignment
};

template <class T>
struct Problem {
  explicit Problem(const Shape& s)
      : shape(s),
        num_rows(s.tokens * s.choices + 37),
        rows(static_cast<size_t>(s.tokens * s.choices)),
        choice_of(static_cast<size_t>(num_rows), -1),
        x(static_cast<size_t>(s.tokens * s.hidden), s.offset),
        y(static_cast<size_t>(num_rows * s.hidden), s.offset),
        weights(rows.size()),
        scratch(static_cast<size_t>(num_rows)) {
    Random random(13);
    std::vector<int32_t> order(static_cast<size_t>(num_rows));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t draw = below(random, 12);
      rows[i] = draw == 0 ? -1 : draw == 1 ? static_cast<int32_t>(num_rows) : order[i];
      if (draw > 1) choice_of[static_cast<size_t>(rows[i])] = static_cast<int64_t>(i);
      weights[i] = static_cast<float>(below(random, 1000)) / 500.0f;
    }
    for (size_t i = 0; i < x.size(); ++i) set(x[i], static_cast<float>(below(random, 2001) - 1000) / 300.0f);
    for (size_t i = 0; i < y.size(); ++i) set(y[i], static_cast<float>(below(random, 2001) - 1000) / 300.0f);
    // scratch may hold anything, also what could be a choice
    for (size_t i = 0; i < scratch.size(); ++i) scratch[i] = static_cast<int32_t>(below(random, num_rows));
  }

  bool named(size_t choice) const { return rows[choice] >= 0 && rows[choice] < num_rows; }
  size_t row_at(size_t choice) const { return static_cast<size_t>(rows[choice] * shape.hidden); }
  size_t token_at(size_t choice) const {
    return static_cast<size_t>(static_cast<int64_t>(choice) / shape.choices * shape.hidden);
  }

  Shape shape;
  int64_t num_rows;
  Array<int32_t> rows;
  std::vector<int64_t> choice_of;
  Array<T> x, y;
  Array<float> weights;
  Array<int32_t> scratch;
};

// With weights: rows that lie apart, weights that lie apart, and a third of the tokens in a block of their own.
template <class T>
void check_permute(const Shape& shape, bool weighted) {
  constexpr size_t kGap = 16 / sizeof(T), kWeightGap = 3;
  const Problem<T> p(shape);
  const size_t hidden = static_cast<size_t>(shape.hidden), tokens = static_cast<size_t>(shape.tokens);
  const size_t choices = static_cast<size_t>(shape.choices), pitch = hidden + (weighted ? kGap : 0);
  const size_t num_first = weighted ? tokens / 3 : tokens, weights_pitch = choices + kWeightGap;
  Array<T> first(num_first * pitch, shape.offset), second((tokens - num_first) * pitch, shape.offset);
  Array<float> first_weights(num_first * weights_pitch), second_weights((tokens - num_first) * weights_pitch);
  for (size_t t = 0; t < tokens; ++t) {
    const size_t at = t < num_first ? t : t - num_first;
    for (size_t h = 0; h < hidden; ++h) (t < num_first ? first : second)[at * pitch + h] = p.x[t * hidden + h];
    for (size_t j = 0; j < choices; ++j)
      (t < num_first ? first_weights : second_weights)[at * weights_pitch + j] = p.weights[t * choices + j];
  }
  Array<T> y(p.choice_of.size() * pitch, shape.offset);
  Array<float> weights(p.scratch.size() * kWeightGap);
  for (size_t i = 0; i < y.size(); ++i) set(y[i], -7.0f);  // what lies behind a row stays
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = -7.0f;
  const auto pitch_bytes = static_cast<int64_t>(pitch * sizeof(T)), weights_step = static_cast<int64_t>(weights_pitch);
  const PermuteArgs args{
      .first = {first.data(), pitch_bytes, first_weights.data(), weights_step},
      .second = {second.data(), pitch_bytes, second_weights.data(), weights_step},
      .num_first = static_cast<int64_t>(num_first),
      .rows_TK = p.rows.data(),
      .num_tokens = shape.tokens,
      .num_choices = shape.choices,
      .y_NH = y.data(),
      .y_pitch = pitch_bytes,
      .num_rows = p.num_rows,
      .row_bytes = shape.hidden * static_cast<int64_t>(sizeof(T)),
      .choice_of_row = p.scratch.data(),
      .weights_N = weighted ? weights.data() : nullptr,
      .weights_N_pitch = static_cast<int64_t>(kWeightGap),
      .weight_bytes = weighted ? 4 : 0,
  };
  EXPECT(launch_permute(args, kStream) == nullptr);
  for (size_t r = 0; r < p.choice_of.size(); ++r) {
    const bool named = p.choice_of[r] >= 0;
    const float weight = named ? p.weights[static_cast<size_t>(p.choice_of[r])] : 0.0f;
    if (weighted) EXPECT(weights[r * kWeightGap] == weight && weights[r * kWeightGap + 1] == -7.0f);
    for (size_t h = 0; h < hidden; ++h) {
      const float expected = named ? value(p.x[p.token_at(static_cast<size_t>(p.choice_of[r])) + h]) : 0.0f;
      EXPECT(value(y[r * pitch + h]) == expected);
    }
    for (size_t h = hidden; h < pitch; ++h) EXPECT(value(y[r * pitch + h]) == -7.0f);
  }
}

template <class T>
void check_unpermute(const Shape& shape, bool weighted) {
  const Problem<T> p(shape);
  Array<T> x(p.x.size(), shape.offset);
  Array<int32_t> moved(p.rows.size());
  const size_t width = static_cast<size_t>(shape.hidden), pitch = width + 16 / sizeof(T);
  Array<T> y(p.scratch.size() * pitch, shape.offset);  // rows that lie apart, and so do the values that are moved
  Array<int32_t> values(p.scratch.size() * 2);
  for (size_t r = 0; r < p.scratch.size(); ++r) {
    for (size_t h = 0; h < width; ++h) y[r * pitch + h] = p.y[r * width + h];
    values[2 * r] = p.scratch[r];
  }
  const UnpermuteArgs args{
      .y_NH = y.data(),
      .y_pitch = static_cast<int64_t>(pitch * sizeof(T)),
      .type = kType<T>,
      .num_rows = p.num_rows,
      .rows_TK = p.rows.data(),
      .weights_TK = weighted ? p.weights.data() : nullptr,
      .weight_type = FloatType::kFloat32,
      .num_tokens = shape.tokens,
      .num_choices = shape.choices,
      .x_TH = x.data(),
      .hidden = shape.hidden,
      .moved_N = weighted ? nullptr : values.data(),
      .moved_pitch = 2,
      .moved_TK = weighted ? nullptr : moved.data(),
      .moved_bytes = 4,
  };
  EXPECT(launch_unpermute(args, kStream) == nullptr);
  const auto choices = static_cast<size_t>(shape.choices), hidden = static_cast<size_t>(shape.hidden);
  for (size_t t = 0; t < static_cast<size_t>(shape.tokens); ++t) {
    for (size_t h = 0; h < hidden; ++h) {
      float sum = 0.0f;
      for (size_t j = t * choices; j < (t + 1) * choices; ++j) {
        if (p.named(j)) sum += (weighted ? p.weights[j] : 1.0f) * value(p.y[p.row_at(j) + h]);
      }
      T expected;
      set(expected, sum);
      EXPECT(value(x[t * hidden + h]) == value(expected));
    }
  }
  for (size_t j = 0; !weighted && j < moved.size(); ++j)
    EXPECT(moved[j] == (p.named(j) ? p.scratch[static_cast<size_t>(p.rows[j])] : 0));
}

template <class T>
void check_backward(const Shape& shape) {
  const Problem<T> p(shape);
  Array<T> grad_y(p.y.size(), shape.offset);
  Array<float> grad_weights(p.rows.size());
  const UnpermuteBackwardArgs args{
      .grad_TH = p.x.data(),
      .y_NH = p.y.data(),
      .type = kType<T>,
      .num_rows = p.num_rows,
      .rows_TK = p.rows.data(),
      .weights_TK = p.weights.data(),
      .weight_type = FloatType::kFloat32,
      .num_tokens = shape.tokens,
      .num_choices = shape.choices,
      .grad_y_NH = grad_y.data(),
      .grad_weights_TK = grad_weights.data(),
      .hidden = shape.hidden,
      .choice_of_row = p.scratch.data(),
  };
  EXPECT(launch_unpermute_backward(args, kStream) == nullptr);
  const auto hidden = static_cast<size_t>(shape.hidden);
  for (size_t r = 0; r < p.choice_of.size(); ++r) {
    const auto choice = static_cast<size_t>(p.choice_of[r]);
    for (size_t h = 0; h < hidden; ++h) {
      T expected;
      set(expected, p.choice_of[r] < 0 ? 0.0f : value(p.x[p.token_at(choice) + h]) * p.weights[choice]);
      EXPECT(value(grad_y[r * hidden + h]) == value(expected));
    }
  }
  for (size_t j = 0; j < p.rows.size(); ++j) {
    double dot = 0.0, size = 0.0;
    for (size_t h = 0; p.named(j) && h < hidden; ++h) {
      const double term = double{value(p.x[p.token_at(j) + h])} * value(p.y[p.row_at(j) + h]);
      dot += term, size += std::fabs(term);
    }
    EXPECT(std::fabs(grad_weights[j] - dot) <= 1e-5 * size);
  }
}

// Rows of `ffn` gates and as many linear elements; the buffers lie `offset` elements away from 16-byte alignment.
template <class T>
void check_swiglu(int64_t num_rows, int64_t ffn, size_t offset = 0) {
  Random random(17);
  const auto rows = static_cast<size_t>(num_rows), columns = static_cast<size_t>(ffn);
  Array<T> inner(rows * 2 * columns, offset), grad(rows * columns, offset), out(rows * columns, offset);
  Array<T> grad_inner(rows * 2 * columns, offset);
  Array<float> probs(rows), grad_probs(rows);
  for (size_t i = 0; i < inner.size(); ++i) set(inner[i], static_cast<float>(below(random, 2001) - 1000) / 200.0f);
  for (size_t i = 0; i < grad.size(); ++i) set(grad[i], static_cast<float>(below(random, 2001) - 1000) / 300.0f);
  for (size_t n = 0; n < rows; ++n) probs[n] = static_cast<float>(below(random, 1000) + 1) / 500.0f;
  const SwigluArgs forward{
      .inner_NG = inner.data(),
      .type = kType<T>,
      .probs_N = probs.data(),
      .prob_type = FloatType::kFloat32,
      .num_rows = num_rows,
      .ffn = ffn,
      .out_NF = out.data(),
  };
  EXPECT(launch_swiglu(forward, kStream) == nullptr);
  const SwigluBackwardArgs backward{
      .grad_NF = grad.data(),
      .inner_NG = inner.data(),
      .type = kType<T>,
      .probs_N = probs.data(),
      .prob_type = FloatType::kFloat32,
      .num_rows = num_rows,
      .ffn = ffn,
      .grad_inner_NG = grad_inner.data(),
      .grad_probs_N = grad_probs.data(),
  };
  EXPECT(launch_swiglu_backward(backward, kStream) == nullptr);
  const double rounding = std::is_same_v<T, float> ? 1e-6 : std::is_same_v<T, __half> ? 1e-3 : 1e-2;
  // `size` is that of the terms: those of the gate's slope nearly cancel where it has its minimum
  const auto near = [&](double found, double expected, double size) {
    return std::fabs(found - expected) <= rounding * std::fabs(expected) + 2e-6 * std::fabs(size) + 1e-7;
  };
  for (size_t n = 0; n < rows; ++n) {
    double dot = 0.0, size = 0.0;
    for (size_t f = 0; f < columns; ++f) {
      const double g = value(inner[n * 2 * columns + f]), l = value(inner[n * 2 * columns + columns + f]);
      const double d = value(grad[n * columns + f]), s = 1.0 / (1.0 + std::exp(-g)), p = probs[n];
      EXPECT(near(value(out[n * columns + f]), g * s * l * p, 0.0));
      EXPECT(near(value(grad_inner[n * 2 * columns + f]), d * p * l * s * (1.0 + g * (1.0 - s)), d * p * l));
      EXPECT(near(value(grad_inner[n * 2 * columns + columns + f]), d * p * g * s, 0.0));
      dot += d * g * s * l, size += std::fabs(d * g * s * l);
    }
    EXPECT(std::fabs(grad_probs[n] - dot) <= 1e-5 * size);
  }
}

// Tokens choose 0 to 5 experts, of which top_k are kept.
template <class Bits>
void check_chosen(int64_t num_tokens, int num_experts, int top_k) {
  Random random(19);
  const auto tokens = static_cast<size_t>(num_tokens), experts = static_cast<size_t>(num_experts);
  const auto choices = static_cast<size_t>(top_k);
  Array<uint8_t> map(tokens * experts);
  Array<Bits> probs(tokens * experts), weights(tokens * choices), grads(tokens * experts);
  Array<int32_t> ids(tokens * choices);
  for (size_t i = 0; i < map.size(); ++i) map[i] = 0, probs[i] = static_cast<Bits>(below(random, 250) + 1);
  for (size_t t = 0; t < tokens; ++t) {
    for (int64_t c = below(random, 6); c > 0; --c)
      map[t * experts + static_cast<size_t>(below(random, num_experts))] = 1;
  }
  const ChosenExpertsArgs forward{
      .routing_map_TE = map.data(),
      .probs_TE = probs.data(),
      .prob_bytes = sizeof(Bits),
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .top_k = top_k,
      .ids_TK = ids.data(),
      .weights_TK = weights.data(),
  };
  EXPECT(launch_chosen_experts(forward, kStream) == nullptr);
  const ChosenExpertsBackwardArgs backward{
      .grad_TK = weights.data(),
      .grad_bytes = sizeof(Bits),
      .ids_TK = ids.data(),
      .num_tokens = num_tokens,
      .top_k = top_k,
      .num_experts = num_experts,
      .grad_TE = grads.data(),
  };
  EXPECT(launch_chosen_experts_backward(backward, kStream) == nullptr);
  for (size_t t = 0; t < tokens; ++t) {
    size_t choice = 0;
    for (size_t e = 0; e < experts; ++e) {
      const bool kept = map[t * experts + e] != 0 && choice < choices;
      if (kept) {
        EXPECT(ids[t * choices + choice] == static_cast<int32_t>(e));
        EXPECT(weights[t * choices + choice] == probs[t * experts + e]);
        ++choice;
      }
      EXPECT(grads[t * experts + e] == (kept ? probs[t * experts + e] : 0));
    }
    for (; choice < choices; ++choice) {
      EXPECT(ids[t * choices + choice] == num_experts);
      EXPECT(weights[t * choices + choice] == 0);
    }
  }
}

void check_chunks(int64_t num_sources, int64_t num_slots, int64_t most, int64_t missing = 0) {
  Random random(23);
  Array<int64_t> counts(static_cast<size_t>(num_sources * num_slots));
  std::vector<int64_t> first(counts.size());
  int64_t num_rows = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    first[i] = num_rows;
    num_rows += counts[i] = below(random, most + 1);
  }
  Array<int32_t> to_slots(static_cast<size_t>(num_rows - missing)), to_sources(to_slots.size());
  const ChunkRowsArgs args{
      .counts_QS = counts.data(),
      .num_sources = num_sources,
      .num_slots = num_slots,
      .num_rows = num_rows - missing,
      .to_slots_N = to_slots.data(),
      .to_sources_N = to_sources.data(),
  };
  EXPECT(launch_chunk_rows(args, kStream) == nullptr);
  int32_t row = 0;
  for (int64_t s = 0; missing == 0 && s < num_slots; ++s) {
    for (int64_t q = 0; q < num_sources; ++q) {
      const auto chunk = static_cast<size_t>(q * num_slots + s);
      for (int64_t i = 0; i < counts[chunk]; ++i, ++row) {
        EXPECT(to_slots[static_cast<size_t>(first[chunk] + i)] == row);
        EXPECT(to_sources[static_cast<size_t>(row)] == first[chunk] + i);
      }
    }
  }
}

// Every third group has no rows.
void check_groups(size_t num_groups, size_t group_bytes, size_t offset = 0) {
  Array<uint8_t> grad(num_groups * group_bytes, offset);
  Array<int32_t> ends(num_groups);
  int32_t end = 0;
  for (size_t s = 0; s < num_groups; ++s) ends[s] = end += s % 3 == 0 ? 0 : static_cast<int32_t>(s);
  const ZeroEmptyGroupsArgs args{
      .grad_SMK = grad.data(),
      .ends_S = ends.data(),
      .num_groups = static_cast<int64_t>(num_groups),
      .group_bytes = static_cast<int64_t>(group_bytes),
  };
  EXPECT(launch_zero_empty_groups(args, kStream) == nullptr);
  for (size_t i = 0; i < grad.size(); ++i) EXPECT(grad[i] == (i / group_bytes % 3 == 0 ? 0 : 0x5A));
}

void check_rows(const std::string& op, const Shape& shape) {
  if (op == "permute") {
    check_permute<__nv_bfloat16>(shape, true);
    check_permute<float>(shape, false);
  } else if (op == "unpermute") {
    check_unpermute<__nv_bfloat16>(shape, true);
    check_unpermute<__half>(shape, false);
    check_unpermute<float>(shape, true);
  } else {
    check_backward<__nv_bfloat16>(shape);
    check_backward<float>(shape);
  }
}

struct Group {
  int ranks, homes, spare, nodes;
  int64_t tokens;  // of a rank for a hot expert, at most
  uint64_t plan;  // hash of the slots and tokens that the host plans (tests/unit/ops/test_emulated.py compares the two)
};

constexpr Group kGroups[] = {
    {1, 3, 1, 1, 50, 1697899725085599174ull},  {8, 4, 1, 1, 1000, 3835193234095607142ull},
    {8, 2, 2, 2, 90, 11178641950389210856ull}, {40, 2, 1, 4, 300, 5145475445065877128ull},
    {6, 1, 2, 1, 7, 5761126918571263727ull},   {36, 1, 1, 1, 100000, 3086029466648728344ull},
};

void check_exact_split(const Group& group) {
  Random random(17);
  const int experts = group.ranks * group.homes, slots = group.homes + group.spare;
  Array<int64_t> counts(static_cast<size_t>(group.ranks * experts));
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t expert = static_cast<int64_t>(i) % experts;
    counts[i] = below(random, expert % 5 == 0 ? group.tokens : expert % 7 == 0 ? 1 : group.tokens / 8 + 1);
  }
  Array<int64_t> slots_RS(static_cast<size_t>(group.ranks * slots)), tokens_RS(slots_RS.size());
  const ExactSplitArgs args{.counts_RE = counts.data(),
                            .num_ranks = group.ranks,
                            .num_experts = experts,
                            .num_slots = slots,
                            .num_nodes = group.nodes,
                            .slots_RS = slots_RS.data(),
                            .tokens_RS = tokens_RS.data()};
  EXPECT(launch_exact_split(args, kStream) == nullptr);
  uint64_t plan = 14695981039346656037ull;  // FNV-1a over the numbers
  for (const auto* numbers : {&slots_RS, &tokens_RS}) {
    for (size_t i = 0; i < numbers->size(); ++i)
      plan = (plan ^ static_cast<uint64_t>((*numbers)[i])) * 1099511628211ull;
  }
  EXPECT(plan == group.plan);
}

void check(const std::string& op) {
  if (op == "exact_split") {
    for (const Group& group : kGroups) check_exact_split(group);
  } else if (op == "dispatch_map") {
    check_dispatch_map<int64_t>(0, 4, 4, 0);
    check_dispatch_map<int32_t>(1, 1, 1, 0);
    check_dispatch_map<int32_t>(700, 8, 12, 0);
    check_dispatch_map<int64_t>(2500, 300, 300, 0);
    check_dispatch_map<int64_t>(600, 7, 7, 0, 3);
    check_dispatch_map<int64_t>(6500, 16, 16, 2);
  } else if (op == "chosen") {
    check_chosen<uint32_t>(0, 4, 2);
    check_chosen<uint32_t>(1, 1, 1);
    check_chosen<uint16_t>(20, 8, 2);
    check_chosen<uint32_t>(37, 100, 4);
    check_chosen<uint64_t>(9, 33, 40);
  } else if (op == "chunks") {
    check_chunks(1, 1, 0);
    check_chunks(2, 3, 5);
    check_chunks(8, 5, 300);
    check_chunks(13, 23, 2);
    check_chunks(4, 4, 50, 7);
  } else if (op == "groups") {
    check_groups(0, 16);
    check_groups(2, 0);
    check_groups(1, 16);
    check_groups(7, 4112);
    check_groups(10, 50);
    check_groups(4, 48, 1);
    check_groups(3, 300 * 1024);
  } else if (op == "swiglu") {
    check_swiglu<__nv_bfloat16>(0, 8);
    check_swiglu<__nv_bfloat16>(3, 0);
    check_swiglu<float>(1, 1);
    check_swiglu<__half>(9, 520);
    check_swiglu<__nv_bfloat16>(17, 40);
    check_swiglu<__nv_bfloat16>(5, 2056);
    check_swiglu<float>(8, 136);
    check_swiglu<float>(11, 13);
    check_swiglu<__half>(6, 24, 1);
  } else {
    for (const Shape& shape : {Shape{5, 1, 8}, Shape{9, 2, 520}, Shape{3, 3, 40}, Shape{4, 8, 1040}, Shape{6, 2, 24, 1},
                               Shape{20, 5, 136}, Shape{3, 6, 13}, Shape{7, 4, 2056}, Shape{300, 1, 8}}) {
      check_rows(op, shape);
    }
  }
}
}  // namespace

int main(int argc, char** argv) {
  const std::string op = argc > 1 ? argv[1] : "all";
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 1;
  cuda_emulator::mutant = argc > 3 ? std::atoi(argv[3]) : 0;
  for (int s = 0; s < seeds; ++s) {
    cuda_emulator::seed() = static_cast<uint64_t>(s);
    for (const char* one :
         {"dispatch_map", "exact_split", "permute", "unpermute", "backward", "swiglu", "groups", "chosen", "chunks"}) {
      if (op == one || op == "all") check(one);
    }
  }
  std::printf("ok, %d seeds\n", seeds);
  return 0;
}
