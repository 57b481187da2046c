// Argument checks of all ops, shared by the CPU kernels and the CUDA glue. The order and the texts are those of
// megatron_smartmoe/ops/checks.py (a test compares them): an error must read the same whichever code serves the op.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace smartmoe {
using torch::headeronly::ScalarType;

// A counting sort keeps 20 bytes per slot in shared memory: 40 KiB, which every GPU grants without asking.
constexpr int64_t kMaxSlots = 2048;
constexpr int64_t kMaxRows = 2147483647;  // rows are int32
constexpr int64_t kPlanNumbers = 4;       // before the other parts of a plan
constexpr int64_t kMaxTokens = 9223372036854775807;

// The parts joined.
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws the parts joined as one message. std::runtime_error is the one exception that torch's stable ABI turns into a
// Python error; STD_TORCH_CHECK throws the same, with a source path in front that tells a user nothing.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(text_of(parts...));
}

// The dtype as Python spells it: mostly torch's own name in lower case.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  std::string name = torch::headeronly::toString(dtype);
  for (char& letter : name) {
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return name;
}

// The shape as Python prints a list of its sizes.
inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(tensor.size(d));
  }
  return text += "]";
}

inline std::string device_text(const torch::stable::Tensor& tensor) {
  if (!tensor.is_cuda()) return "cpu";
  return text_of("cuda:", tensor.get_device_index());
}

inline void check_ids(const char* name, const torch::stable::Tensor& ids) {
  const ScalarType dtype = ids.scalar_type();
  if (dtype == ScalarType::Int || dtype == ScalarType::Long) return;
  fail(name, ".dtype = ", dtype_name(dtype), ": it must be int32 or int64. Convert it with ", name, ".long()");
}

inline void check_int64(const char* name, const torch::stable::Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Long) return;
  fail(name, ".dtype = ", dtype_name(dtype), ": it must be int64. Convert it to int64");
}

inline void check_float(const char* name, const torch::stable::Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) return;
  if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
  fail(name, ".dtype = ", dtype_name(dtype), ": it must be float16, bfloat16, float32 or float64. Convert it with ",
       name, ".float()");
}

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, bool ok, const std::string& rule,
                        const char* way_out) {
  if (!ok) fail(name, ".shape = ", shape_text(tensor), ": it must be ", rule, ". ", way_out);
}

inline void check_device(const char* name, const torch::stable::Tensor& tensor, const char* other_name,
                         const torch::stable::Tensor& other) {
  const std::string device = device_text(tensor), expected = device_text(other);
  if (device == expected) return;
  fail(name, ".device = ", device, ": it must be ", expected, ", as ", other_name, " has it. Convert it with ", name,
       ".to(", other_name, ".device)");
}

inline void check_num_choices(const char* name, const torch::stable::Tensor& tensor) {
  if (tensor.numel() <= kMaxRows) return;
  fail(name, ".shape = ", shape_text(tensor), ": it must have at most ", kMaxRows, " choices. Split the micro-batch");
}

// Counts of tokens that add up to more than int64 holds would lose tokens in silence.
[[noreturn]] inline void fail_overflow(const char* name) {
  fail(name, " = counts that add up to more than ", kMaxTokens,
       ": the tokens of a layer must fit in int64. Pass counts of tokens");
}

inline void check_split(const torch::stable::Tensor& counts_RE, const torch::stable::Tensor& hosts_ER) {
  check_int64("counts_RE", counts_RE);
  if (hosts_ER.scalar_type() != ScalarType::Bool) {
    fail("hosts_ER.dtype = ", dtype_name(hosts_ER.scalar_type()), ": it must be bool. Convert it to bool");
  }
  check_shape("counts_RE", counts_RE, counts_RE.dim() == 2 && counts_RE.size(0) >= 1, "[R, E] with at least one rank",
              "Pass the counts of one layer, a row per source rank");
  const std::string expected = text_of("[", counts_RE.size(1), ", ", counts_RE.size(0), "]");
  check_shape("hosts_ER", hosts_ER, shape_text(hosts_ER) == expected,
              text_of("[E, R] = ", expected, ", as counts_RE has it"), "Pass a row per expert");
}

inline void check_nodes(const char* name, int64_t num_nodes, int64_t num_ranks) {
  if (num_nodes >= 1 && num_ranks % num_nodes == 0) return;
  fail(name, " = ", num_nodes, ": it must divide R = ", num_ranks, ". Pass the nodes that the ranks lie on");
}

inline void check_replicas(const torch::stable::Tensor& load_E, const torch::stable::Tensor& slots_RS,
                           int64_t home_slots, int64_t num_nodes, int64_t trials) {
  check_int64("load_E", load_E);
  check_int64("slots_RS", slots_RS);
  check_shape("load_E", load_E, load_E.dim() == 1, "[E]", "Pass the sum of the counts over the source ranks");
  check_shape("slots_RS", slots_RS, slots_RS.dim() == 2 && slots_RS.size(0) >= 1, "[R, S] with at least one rank",
              "Pass the slots of one layer, a row per rank");
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = load_E.size(0);
  // the product is small once home_slots is known to be at most S
  if (home_slots < 0 || home_slots > num_slots || home_slots * num_ranks != num_experts) {
    fail("home_slots = ", home_slots, ": it must be E / R = ", num_experts, " / ", num_ranks,
         ", and at most S = ", num_slots, ". Pass the number of homes of a rank");
  }
  check_nodes("num_nodes", num_nodes, num_ranks);
  if (trials < 0) fail("trials = ", trials, ": it must be at least 0. Pass 0 for no search");
}

inline void check_exact_split(const torch::stable::Tensor& counts_RE, int64_t spare_slots, int64_t num_nodes) {
  check_int64("counts_RE", counts_RE);
  const bool ok = counts_RE.dim() == 2 && counts_RE.numel() > 0 && counts_RE.size(1) % counts_RE.size(0) == 0;
  check_shape("counts_RE", counts_RE, ok, "[R, E] with E a multiple of R", "Pass the counts of one layer");
  if (spare_slots < 0 || spare_slots > kMaxSlots) {
    fail("spare_slots = ", spare_slots, ": it must be in 0..", kMaxSlots, ". Pass the spare slots of a rank");
  }
  check_nodes("num_nodes", num_nodes, counts_RE.size(0));
}

inline void check_history_replicas(const torch::stable::Tensor& slots_RS, const torch::stable::Tensor& loads_KE,
                                   int64_t home_slots, int64_t num_nodes, int64_t max_steps, int64_t max_experts,
                                   int64_t max_slots, int64_t trials) {
  check_int64("slots_RS", slots_RS);
  check_int64("loads_KE", loads_KE);
  check_shape("slots_RS", slots_RS, slots_RS.dim() == 2 && slots_RS.size(0) >= 1, "[R, S] with at least one rank",
              "Pass the slots of one layer, a row per rank");
  check_shape("loads_KE", loads_KE, loads_KE.dim() == 2 && loads_KE.numel() > 0, "[K, E], none of them 0",
              "Pass a scenario in each row");
  const int64_t num_ranks = slots_RS.size(0), num_slots = slots_RS.size(1), num_experts = loads_KE.size(1);
  if (home_slots < 1 || home_slots > num_slots || home_slots * num_ranks != num_experts) {
    fail("home_slots = ", home_slots, ": it must be E / R = ", num_experts, " / ", num_ranks,
         ", and at most S = ", num_slots, ". Pass the number of homes of a rank");
  }
  check_nodes("num_nodes", num_nodes, num_ranks);
  for (const int64_t most : {max_steps, max_experts, max_slots, trials}) {
    if (most < 0) fail("a limit of the search = ", most, ": it must be at least 0. Pass those of search_space");
  }
}

inline void check_relay_tree(const torch::stable::Tensor& slots_RS, int64_t home_slots, int64_t num_nodes) {
  check_int64("slots_RS", slots_RS);
  check_shape("slots_RS", slots_RS, slots_RS.dim() == 2 && slots_RS.size(0) >= 1, "[R, S] with at least one rank",
              "Pass the slots of one layer, a row per rank");
  if (home_slots < 1 || home_slots > slots_RS.size(1)) {
    fail("home_slots = ", home_slots, ": it must be in 1..S = ", slots_RS.size(1),
         ". Pass the number of homes of a rank");
  }
  check_nodes("num_nodes", num_nodes, slots_RS.size(0));
}

inline void check_relayed_flow(const torch::stable::Tensor& counts_RE, const torch::stable::Tensor& slots_RS,
                               int64_t home_slots, int64_t num_nodes,
                               const std::optional<torch::stable::Tensor>& kept_RS) {
  check_history_replicas(slots_RS, counts_RE, home_slots, num_nodes, 0, 0, 0, 0);
  check_shape("counts_RE", counts_RE, counts_RE.size(0) == slots_RS.size(0),
              text_of("[R, E] with R = ", slots_RS.size(0), ", as slots_RS has it"),
              "Pass the counts of the same ranks");
  if (kept_RS) check_history_replicas(*kept_RS, counts_RE, home_slots, num_nodes, 0, 0, 0, 0);
}

inline void check_price(const torch::stable::Tensor& price_23) {
  if (!price_23.is_cpu() || price_23.scalar_type() != ScalarType::Double) {
    fail("price_23.dtype = ", dtype_name(price_23.scalar_type()),
         ": it must be float64, on the CPU. Pass the prices of replicas as such a tensor");
  }
  check_shape("price_23", price_23,
              price_23.dim() == 2 && price_23.size(0) == 2 && price_23.size(1) == 3 && price_23.is_contiguous(),
              "[2, 3], contiguous", "Pass what weights and gradients cost");
  for (int64_t i = 0; i < 6; ++i) {
    const double tokens = price_23.const_data_ptr<double>()[i];
    if (!(tokens >= 0)) {
      fail("price_23[", i / 3, ", ", i % 3, "] = ", tokens,
           ": it must be at least 0. Pass 0 for replicas that cost nothing");
    }
  }
}

inline void check_paying_replicas(const torch::stable::Tensor& loads_KE, const torch::stable::Tensor& slots_RS,
                                  int64_t home_slots, const torch::stable::Tensor& price_23, int64_t num_nodes) {
  check_history_replicas(slots_RS, loads_KE, home_slots, num_nodes, 0, 0, 0, 0);
  check_price(price_23);
}

inline void check_exact_plan(const torch::stable::Tensor& load_E, const torch::stable::Tensor& slots_RS,
                             int64_t home_slots, int64_t scope_nodes, const torch::stable::Tensor& price_23,
                             int64_t num_nodes) {
  check_replicas(load_E, slots_RS, home_slots, num_nodes, 0);
  check_nodes("scope_nodes", scope_nodes, slots_RS.size(0));
  check_price(price_23);
}

inline void check_dense(const char* name, const torch::stable::Tensor& tensor) {
  if (!tensor.is_contiguous()) fail(name, ": it must be contiguous. Convert it with ", name, ".contiguous()");
}

inline void check_below(const char* name, int64_t value, const char* axis, int64_t end) {
  if (value >= 0 && value < end) return;
  fail(name, " = ", value, ": it must be at least 0 and below ", axis, " = ", end, ". Pass this rank's number");
}

// Elements of the plan that plan_dispatch writes, its parts in their order in csrc/cpu/plan_dispatch.cpp.
inline int64_t plan_size(int64_t num_ranks, int64_t tp_size, int64_t num_experts, int64_t num_slots) {
  const int64_t num_all = num_ranks * num_slots;
  return kPlanNumbers + 4 * num_ranks + num_experts + num_slots + tp_size + (tp_size + 2) * num_all +
         5 * (num_all - num_experts);
}

inline void check_plan_dispatch(const torch::stable::Tensor& counts_RPE, const torch::stable::Tensor& slots_RS,
                                int64_t home_slots, int64_t num_nodes, int64_t rank, int64_t tp_rank,
                                const std::optional<int64_t>& used_slots, int64_t scope_nodes,
                                const torch::stable::Tensor& price_23, const torch::stable::Tensor& plan) {
  check_int64("counts_RPE", counts_RPE);
  check_int64("slots_RS", slots_RS);
  check_int64("plan", plan);
  check_shape("counts_RPE", counts_RPE, counts_RPE.dim() == 3 && counts_RPE.numel() > 0, "[R, P, E], none of them 0",
              "Pass the counts of one layer, a row per source rank");
  const int64_t num_ranks = counts_RPE.size(0), tp_size = counts_RPE.size(1), num_experts = counts_RPE.size(2);
  check_shape("slots_RS", slots_RS, slots_RS.dim() == 2 && slots_RS.size(0) == num_ranks,
              text_of("[R, S] with R = ", num_ranks, ", as counts_RPE has it"), "Pass the slots of the same ranks");
  const int64_t num_slots = slots_RS.size(1);
  if (home_slots < 1 || home_slots > num_slots || home_slots * num_ranks != num_experts) {
    fail("home_slots = ", home_slots, ": it must be E / R = ", num_experts, " / ", num_ranks,
         ", and at most S = ", num_slots, ". Pass the number of homes of a rank");
  }
  check_nodes("num_nodes", num_nodes, num_ranks);
  check_nodes("scope_nodes", scope_nodes, num_ranks);
  check_price(price_23);
  check_below("rank", rank, "R", num_ranks);
  check_below("tp_rank", tp_rank, "P", tp_size);
  if (used_slots && (*used_slots < 0 || *used_slots > num_slots - home_slots)) {
    fail("used_slots = ", *used_slots, ": it must be in 0..", num_slots - home_slots,
         ", the spare slots of a rank. Pass how many of them to use");
  }
  const int64_t size = plan_size(num_ranks, tp_size, num_experts, num_slots);
  check_shape("plan", plan, plan.dim() == 1 && plan.size(0) == size, text_of("[", size, "]"), "Pass a PlanBuffer's");
  check_dense("counts_RPE", counts_RPE);
  check_dense("slots_RS", slots_RS);
  check_dense("plan", plan);
}

inline void check_digest_sum(const torch::stable::Tensor& bits_N, const torch::stable::Tensor& positions_L,
                             int64_t width) {
  const ScalarType dtype = bits_N.scalar_type();
  if (dtype != ScalarType::Byte && dtype != ScalarType::Short && dtype != ScalarType::Int && dtype != ScalarType::Long)
    fail("bits_N.dtype = ", dtype_name(dtype),
         ": it must be uint8, int16, int32 or int64. Pass the elements as a view of integers of their size");
  check_int64("positions_L", positions_L);
  check_shape("positions_L", positions_L, positions_L.dim() == 1 && positions_L.is_contiguous(), "[L], contiguous",
              "Pass the position of the first element of each row");
  // a division, since the product could overflow
  const bool fits = bits_N.dim() == 1 && bits_N.is_contiguous() && width >= 1 && bits_N.size(0) % width == 0 &&
                    bits_N.size(0) / width == positions_L.size(0);
  check_shape("bits_N", bits_N, fits,
              text_of("[L * width], contiguous, of L = ", positions_L.numel(), " rows of width = ", width, " >= 1"),
              "Pass the elements of all rows one after another");
}

inline void check_dispatch_map(const torch::stable::Tensor& ids_TK, const torch::stable::Tensor& slot_of_E,
                               int64_t num_slots) {
  check_ids("ids_TK", ids_TK);
  check_ids("slot_of_E", slot_of_E);
  check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass a row of expert ids per token");
  check_num_choices("ids_TK", ids_TK);
  check_shape("slot_of_E", slot_of_E, slot_of_E.dim() == 1 && slot_of_E.numel() >= 1, "[E] with at least one expert",
              "Pass the slot of each logical expert");
  if (num_slots < 1 || num_slots > kMaxSlots) {
    fail("num_slots = ", num_slots, ": it must be in 1..", kMaxSlots,
         ". Pass the number of slots that slot_of_E points into");
  }
  check_device("slot_of_E", slot_of_E, "ids_TK", ids_TK);
}

// The map of dispatch_map, beside the rows or tokens `tensor` that it is used on.
inline void check_rows(const torch::stable::Tensor& rows_TK, const char* name, const torch::stable::Tensor& tensor) {
  if (rows_TK.scalar_type() != ScalarType::Int) {
    fail("rows_TK.dtype = ", dtype_name(rows_TK.scalar_type()),
         ": it must be int32. Pass the rows of dispatch_map, or convert it with rows_TK.int()");
  }
  check_shape("rows_TK", rows_TK, rows_TK.dim() == 2, "[T, K_top]", "Pass the rows of dispatch_map");
  check_num_choices("rows_TK", rows_TK);
  check_device("rows_TK", rows_TK, name, tensor);
}

inline void check_num_rows(int64_t num_rows) {
  if (num_rows >= 0 && num_rows <= kMaxRows) return;
  fail("num_rows = ", num_rows, ": it must be in 0..", kMaxRows,
       ". Pass the sum of dispatch_map's tokens_S, or any larger number");
}

inline void check_permute(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& rows_TK, int64_t num_rows) {
  check_shape("x_TH", x_TH, x_TH.dim() == 2, "[T, H]", "Pass a row per token");
  check_rows(rows_TK, "x_TH", x_TH);
  check_shape("rows_TK", rows_TK, rows_TK.size(0) == x_TH.size(0),
              text_of("[T, K_top] with T = ", x_TH.size(0), ", as x_TH has it"), "Pass the rows of the same tokens");
  check_num_rows(num_rows);
}

// The same rows, whose elements are neighbours; rows may lie apart, as views of packed rows do.
inline torch::stable::Tensor dense_rows(const torch::stable::Tensor& rows) {
  const bool dense = (rows.size(1) <= 1 || rows.stride(1) == 1) && rows.stride(0) >= rows.size(1);
  return dense ? rows : torch::stable::contiguous(rows);
}

inline int64_t row_pitch_bytes(const torch::stable::Tensor& rows) {
  return rows.stride(0) * static_cast<int64_t>(rows.element_size());
}

// A row with its weight behind it: `width` of megatron_smartmoe/ops/packed.py has the same numbers.
struct PackedRow {
  static constexpr int64_t kAlignment = 16;  // bytes
  int64_t weight_at;                         // where the weight begins, in bytes
  int64_t bytes, elements;                   // of a packed row

  PackedRow(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& weights_TK)
      : weight_at(rounded_up(x_TH.size(1) * static_cast<int64_t>(x_TH.element_size()),
                             static_cast<int64_t>(weights_TK.element_size()))),
        bytes(rounded_up(weight_at + static_cast<int64_t>(weights_TK.element_size()), kAlignment)),
        elements(bytes / static_cast<int64_t>(x_TH.element_size())) {}

 private:
  static int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
};

inline void check_unpermute(const torch::stable::Tensor& y_NH, const torch::stable::Tensor& rows_TK,
                            const std::optional<torch::stable::Tensor>& weights_TK) {
  const ScalarType dtype = y_NH.scalar_type();
  check_float("y_NH", y_NH);
  check_shape("y_NH", y_NH, y_NH.dim() == 2, "[N, H]", "Pass the permuted rows");
  check_num_rows(y_NH.size(0));
  check_rows(rows_TK, "y_NH", y_NH);
  if (!weights_TK) return;
  if (weights_TK->scalar_type() != ScalarType::Float && weights_TK->scalar_type() != dtype) {
    fail("weights_TK.dtype = ", dtype_name(weights_TK->scalar_type()), ": it must be float32, or ", dtype_name(dtype),
         " as y_NH is. Convert it with weights_TK.float()");
  }
  check_shape("weights_TK", *weights_TK, shape_text(*weights_TK) == shape_text(rows_TK),
              text_of(shape_text(rows_TK), ", as rows_TK has it"), "Pass a weight per choice");
  check_device("weights_TK", *weights_TK, "y_NH", y_NH);
}

inline void check_unpermute_backward(const torch::stable::Tensor& grad_TH, const torch::stable::Tensor& y_NH,
                                     const torch::stable::Tensor& rows_TK, const torch::stable::Tensor& weights_TK) {
  check_unpermute(y_NH, rows_TK, weights_TK);
  if (grad_TH.scalar_type() != y_NH.scalar_type()) {
    fail("grad_TH.dtype = ", dtype_name(grad_TH.scalar_type()), ": it must be ", dtype_name(y_NH.scalar_type()),
         ", as y_NH is. Convert it with grad_TH.to(y_NH.dtype)");
  }
  const std::string expected = text_of("[", rows_TK.size(0), ", ", y_NH.size(1), "]");
  check_shape("grad_TH", grad_TH, shape_text(grad_TH) == expected,
              text_of("[T, H] = ", expected, ", as rows_TK and y_NH have it"),
              "Pass the gradient of unpermute's result");
  check_device("grad_TH", grad_TH, "y_NH", y_NH);
}

inline void check_swiglu(const torch::stable::Tensor& inner_NG, const torch::stable::Tensor& probs_N) {
  const ScalarType dtype = inner_NG.scalar_type();
  check_float("inner_NG", inner_NG);
  check_shape("inner_NG", inner_NG, inner_NG.dim() == 2 && inner_NG.size(1) % 2 == 0, "[N, 2 F]",
              "Pass the gate's columns, then those of the linear part");
  if (inner_NG.size(0) > kMaxRows) {
    fail("inner_NG.shape = ", shape_text(inner_NG), ": it must have at most ", kMaxRows,
         " rows. Split the micro-batch");
  }
  if (probs_N.scalar_type() != ScalarType::Float && probs_N.scalar_type() != dtype) {
    fail("probs_N.dtype = ", dtype_name(probs_N.scalar_type()), ": it must be float32, or ", dtype_name(dtype),
         " as inner_NG is. Convert it with probs_N.float()");
  }
  const std::string expected = text_of("[", inner_NG.size(0), "]");
  check_shape("probs_N", probs_N, shape_text(probs_N) == expected, text_of("[N] = ", expected, ", as inner_NG has it"),
              "Pass a probability per row");
  check_device("probs_N", probs_N, "inner_NG", inner_NG);
}

inline void check_swiglu_backward(const torch::stable::Tensor& grad_NF, const torch::stable::Tensor& inner_NG,
                                  const torch::stable::Tensor& probs_N) {
  check_swiglu(inner_NG, probs_N);
  if (grad_NF.scalar_type() != inner_NG.scalar_type()) {
    fail("grad_NF.dtype = ", dtype_name(grad_NF.scalar_type()), ": it must be ", dtype_name(inner_NG.scalar_type()),
         ", as inner_NG is. Convert it with grad_NF.to(inner_NG.dtype)");
  }
  const std::string expected = text_of("[", inner_NG.size(0), ", ", inner_NG.size(1) / 2, "]");
  check_shape("grad_NF", grad_NF, shape_text(grad_NF) == expected,
              text_of("[N, F] = ", expected, ", as inner_NG has it"), "Pass the gradient of swiglu's result");
  check_device("grad_NF", grad_NF, "inner_NG", inner_NG);
}

inline void check_empty_groups(const torch::stable::Tensor& grad_SMK, const torch::stable::Tensor& ends_S) {
  check_shape("grad_SMK", grad_SMK, grad_SMK.dim() == 3 && grad_SMK.is_contiguous(), "[S, M, K], contiguous",
              "Pass the gradient of the weights of all groups");
  if (ends_S.scalar_type() != ScalarType::Int) {
    fail("ends_S.dtype = ", dtype_name(ends_S.scalar_type()), ": it must be int32. Convert it with ends_S.int()");
  }
  const std::string expected = text_of("[", grad_SMK.size(0), "]");
  check_shape("ends_S", ends_S, shape_text(ends_S) == expected && ends_S.is_contiguous(),
              text_of("[S] = ", expected, ", as grad_SMK has it, contiguous"), "Pass where the rows of each group end");
  check_device("ends_S", ends_S, "grad_SMK", grad_SMK);
}

inline void check_permute_weighted(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& weights_TK,
                                   const torch::stable::Tensor& rows_TK, int64_t num_rows) {
  check_permute(x_TH, rows_TK, num_rows);
  check_float("weights_TK", weights_TK);
  check_shape("weights_TK", weights_TK, shape_text(weights_TK) == shape_text(rows_TK),
              text_of(shape_text(rows_TK), ", as rows_TK has it"), "Pass a weight per choice");
  check_device("weights_TK", weights_TK, "x_TH", x_TH);
}

// More tokens, in another piece of memory than those of x_TH.
inline void check_permute_joined(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& more_TH,
                                 const torch::stable::Tensor& rows_TK, int64_t num_rows) {
  check_shape("x_TH", x_TH, x_TH.dim() == 2, "[T, H]", "Pass a row per token");
  if (more_TH.scalar_type() != x_TH.scalar_type()) {
    fail("more_TH.dtype = ", dtype_name(more_TH.scalar_type()), ": it must be ", dtype_name(x_TH.scalar_type()),
         ", as x_TH is. Convert it with more_TH.to(x_TH.dtype)");
  }
  check_shape("more_TH", more_TH, more_TH.dim() == 2 && more_TH.size(1) == x_TH.size(1),
              text_of("[T, H] with H = ", x_TH.size(1), ", as x_TH has it"), "Pass rows of the same size");
  check_device("more_TH", more_TH, "x_TH", x_TH);
  check_rows(rows_TK, "x_TH", x_TH);
  const int64_t num_tokens = x_TH.size(0) + more_TH.size(0);
  check_shape("rows_TK", rows_TK, rows_TK.size(0) == num_tokens,
              text_of("[T, K_top] with T = ", num_tokens, ", as x_TH and more_TH have it"),
              "Pass the rows of the same tokens");
  check_num_rows(num_rows);
}

inline void check_weights_of(const char* name, const torch::stable::Tensor& weights_TK, const char* rows_name,
                             const torch::stable::Tensor& x_TH, int64_t num_choices) {
  const std::string expected = text_of("[", x_TH.size(0), ", ", num_choices, "]");
  check_shape(name, weights_TK, shape_text(weights_TK) == expected,
              text_of("[T, K_top] = ", expected, ", as ", rows_name, " and rows_TK have it"),
              "Pass a weight per choice");
  check_device(name, weights_TK, "x_TH", x_TH);
}

inline void check_permute_packed(const torch::stable::Tensor& x_TH, const torch::stable::Tensor& weights_TK,
                                 const std::optional<torch::stable::Tensor>& more_TH,
                                 const std::optional<torch::stable::Tensor>& more_weights_TK,
                                 const torch::stable::Tensor& rows_TK, int64_t num_rows) {
  if (more_TH.has_value() != more_weights_TK.has_value())
    fail("more_TH, more_weights_TK: one is missing: it must be both there or both None. Pass the other one too");
  if (more_TH)
    check_permute_joined(x_TH, *more_TH, rows_TK, num_rows);
  else
    check_permute(x_TH, rows_TK, num_rows);
  check_float("x_TH", x_TH);
  check_float("weights_TK", weights_TK);
  check_weights_of("weights_TK", weights_TK, "x_TH", x_TH, rows_TK.size(1));
  if (!more_TH) return;
  if (more_weights_TK->scalar_type() != weights_TK.scalar_type()) {
    fail("more_weights_TK.dtype = ", dtype_name(more_weights_TK->scalar_type()), ": it must be ",
         dtype_name(weights_TK.scalar_type()),
         ", as weights_TK is. Convert it with more_weights_TK.to(weights_TK.dtype)");
  }
  check_weights_of("more_weights_TK", *more_weights_TK, "more_TH", *more_TH, rows_TK.size(1));
}

inline void check_permute_weighted_backward(const torch::stable::Tensor& grad_NH, const torch::stable::Tensor& grad_N,
                                            const torch::stable::Tensor& rows_TK) {
  check_float("grad_NH", grad_NH);
  check_shape("grad_NH", grad_NH, grad_NH.dim() == 2, "[N, H]", "Pass the gradient of the permuted rows");
  check_num_rows(grad_NH.size(0));
  check_rows(rows_TK, "grad_NH", grad_NH);
  check_float("grad_N", grad_N);
  const std::string expected = text_of("[", grad_NH.size(0), "]");
  check_shape("grad_N", grad_N, shape_text(grad_N) == expected, text_of("[N] = ", expected, ", as grad_NH has it"),
              "Pass the gradient of the permuted weights");
  check_device("grad_N", grad_N, "grad_NH", grad_NH);
}

inline void check_top_k(int64_t top_k) {
  if (top_k >= 1 && top_k <= kMaxSlots) return;
  fail("top_k = ", top_k, ": it must be in 1..", kMaxSlots, ". Pass the number of experts that a token chooses");
}

inline void check_chosen_experts(const torch::stable::Tensor& routing_map_TE, const torch::stable::Tensor& probs_TE,
                                 int64_t top_k) {
  if (routing_map_TE.scalar_type() != ScalarType::Bool) {
    fail("routing_map_TE.dtype = ", dtype_name(routing_map_TE.scalar_type()),
         ": it must be bool. Convert it with routing_map_TE.bool()");
  }
  check_shape("routing_map_TE", routing_map_TE, routing_map_TE.dim() == 2, "[T, E]",
              "Pass which experts each token chose");
  check_num_choices("routing_map_TE", routing_map_TE);
  check_float("probs_TE", probs_TE);
  const std::string expected = shape_text(routing_map_TE);
  check_shape("probs_TE", probs_TE, shape_text(probs_TE) == expected, text_of(expected, ", as routing_map_TE has it"),
              "Pass a probability per token and expert");
  check_device("probs_TE", probs_TE, "routing_map_TE", routing_map_TE);
  check_top_k(top_k);
}

inline void check_chosen_experts_backward(const torch::stable::Tensor& grad_TK, const torch::stable::Tensor& ids_TK,
                                          int64_t num_experts) {
  check_float("grad_TK", grad_TK);
  if (ids_TK.scalar_type() != ScalarType::Int) {
    fail("ids_TK.dtype = ", dtype_name(ids_TK.scalar_type()), ": it must be int32. Convert it with ids_TK.int()");
  }
  check_shape("ids_TK", ids_TK, ids_TK.dim() == 2, "[T, K_top]", "Pass the ids of chosen_experts");
  check_num_choices("ids_TK", ids_TK);
  const std::string expected = shape_text(ids_TK);
  check_shape("grad_TK", grad_TK, shape_text(grad_TK) == expected, text_of(expected, ", as ids_TK has it"),
              "Pass the gradient of the weights");
  check_device("grad_TK", grad_TK, "ids_TK", ids_TK);
  if (num_experts < 0 || num_experts > kMaxRows) {
    fail("num_experts = ", num_experts, ": it must be in 0..", kMaxRows, ". Pass the number of experts");
  }
}

inline void check_chunk_rows(const torch::stable::Tensor& counts_QS, int64_t num_rows) {
  check_int64("counts_QS", counts_QS);
  check_shape("counts_QS", counts_QS, counts_QS.dim() == 2, "[Q, S]",
              "Pass the rows that arrive from each source for each slot");
  check_num_choices("counts_QS", counts_QS);
  check_num_rows(num_rows);
}
}  // namespace smartmoe
