// What the launchers of the CUDA kernels take and return: one struct of arguments each, with the names and axes of the
// op. Plain C++: neither torch nor the CUDA headers, so glue.cpp is compiled without the toolkit and the kernels are
// compiled without torch. Callers name every field that they set, in the order of the declaration.
//
// T tokens, K choices of each, N rows sorted by slot, H elements of a row, E experts, S slots. All pointers are device
// memory. Results and scratch are written in full, so nobody has to clear them.
#pragma once
#include <cstdint>

namespace smartmoe::cuda {
// Where a kernel is queued: the index of the device and its cudaStream_t.
struct Stream {
  int device;
  void* handle;
};

// nullptr, or the text of the CUDA error that stopped the launch (static storage).
using LaunchError = const char*;

// The floating-point types that the kernels know.
enum class FloatType { kFloat16, kBFloat16, kFloat32 };

// Integers of either width.
struct IntArray {
  const void* data;
  bool is_int64;
};

struct DispatchMapArgs {
  IntArray ids_TK;
  int64_t num_choices;  // T x K
  IntArray slot_of_E;
  int64_t num_experts;
  int num_slots;
  int num_tiles;          // blocks that sort in parallel; any number from 1 on gives the same result
  uint32_t* tile_counts;  // scratch [num_tiles, S]
  int32_t* rows_TK;       // result: the row of each choice, -1 where it is dropped
  int64_t* tokens_S;      // result: rows of each slot
};

// A good num_tiles for this many choices.
int dispatch_map_num_tiles(int64_t num_choices);

// Choices whose id is outside [0, E), or whose slot is outside [0, S), are dropped.
LaunchError launch_dispatch_map(const DispatchMapArgs& args, const Stream& stream);

struct ExactSplitArgs {
  const int64_t* counts_RE;
  int num_ranks, num_experts, num_slots, num_nodes;
  int64_t* slots_RS;   // result: expert in each slot, -1 for none
  int64_t* tokens_RS;  // result: tokens that each slot takes
};

// Shared memory of the one block; a launch may have 48 KiB.
int64_t exact_split_shared_bytes(int64_t num_ranks, int64_t num_experts, int64_t num_slots);

LaunchError launch_exact_split(const ExactSplitArgs& args, const Stream& stream);

// Tokens whose rows lie in one piece of memory, a pitch apart, and their weights.
struct TokenBlock {
  const void* x_TH;
  int64_t x_pitch;         // bytes from a token's row to the next token's
  const void* weights_TK;  // moved along with the rows, if PermuteArgs has a place for them
  int64_t weights_pitch;   // weights from a token's first to the next token's first
};

struct PermuteArgs {
  TokenBlock first, second;
  int64_t num_first;  // tokens of the first block; the others are in the second
  const int32_t* rows_TK;
  int64_t num_tokens;  // of both
  int num_choices;     // of a token
  void* y_NH;          // result: the row of x_TH that names it, zero where none does
  int64_t y_pitch;     // bytes from a row to the next
  int64_t num_rows;
  int64_t row_bytes;        // of the H elements of a row
  int32_t* choice_of_row;   // scratch [N]
  void* weights_N;          // result: the weight of the choice that names the row, zero where none does; nullptr: none
  int64_t weights_N_pitch;  // weights from a row's to the next row's
  int weight_bytes;         // of one
};
LaunchError launch_permute(const PermuteArgs& args, const Stream& stream);

struct UnpermuteArgs {
  const void* y_NH;
  int64_t y_pitch;  // bytes from a row to the next
  FloatType type;   // of y_NH and x_TH
  int64_t num_rows;
  const int32_t* rows_TK;
  const void* weights_TK;  // nullptr: every weight is 1
  FloatType weight_type;
  int64_t num_tokens;
  int num_choices;  // of a token
  void* x_TH;       // result: sum of the choices' rows times their weights, in the order of the choices
  int64_t hidden;
  const void* moved_N;  // a value per row that is moved back to the choice; nullptr: there is none
  int64_t moved_pitch;  // values from a row's to the next row's
  void* moved_TK;       // result: the value of the row that a choice names, zero where it names none
  int moved_bytes;      // of one
};
LaunchError launch_unpermute(const UnpermuteArgs& args, const Stream& stream);

struct UnpermuteBackwardArgs {
  const void* grad_TH;
  const void* y_NH;
  FloatType type;  // of grad_TH, y_NH and grad_y_NH
  int64_t num_rows;
  const int32_t* rows_TK;
  const void* weights_TK;
  FloatType weight_type;  // of weights_TK and grad_weights_TK
  int64_t num_tokens;
  int num_choices;        // of a token
  void* grad_y_NH;        // result: weight times the token's row of grad_TH, zero where no choice names the row
  void* grad_weights_TK;  // result: grad_TH's row times y_NH's row, zero where the choice names no row
  int64_t hidden;
  int32_t* choice_of_row;  // scratch [N]
};
LaunchError launch_unpermute_backward(const UnpermuteBackwardArgs& args, const Stream& stream);

struct ChosenExpertsArgs {
  const uint8_t* routing_map_TE;  // not zero where a token chose an expert
  const void* probs_TE;
  int prob_bytes;  // of one
  int64_t num_tokens;
  int num_experts;
  int top_k;         // K
  int32_t* ids_TK;   // result: a token's experts in ascending order, E where it has fewer than K
  void* weights_TK;  // result: their probabilities, zero where it has fewer
};
LaunchError launch_chosen_experts(const ChosenExpertsArgs& args, const Stream& stream);

struct ChosenExpertsBackwardArgs {
  const void* grad_TK;
  int grad_bytes;  // of one
  const int32_t* ids_TK;
  int64_t num_tokens;
  int top_k;  // K
  int num_experts;
  void* grad_TE;  // result: zero where a token did not choose the expert
};
LaunchError launch_chosen_experts_backward(const ChosenExpertsBackwardArgs& args, const Stream& stream);

// Q sources, S slots: rows arrive in chunks in the order (source, slot).
struct ChunkRowsArgs {
  const int64_t* counts_QS;
  int64_t num_sources;
  int64_t num_slots;
  int64_t num_rows;       // N, the sum of the counts
  int32_t* to_slots_N;    // result: where a row that arrived goes in the order (slot, source)
  int32_t* to_sources_N;  // result: the way back
};
LaunchError launch_chunk_rows(const ChunkRowsArgs& args, const Stream& stream);

// G = 2 F: the gate's F columns of a row, then those of the linear part.
struct SwigluArgs {
  const void* inner_NG;
  FloatType type;  // of inner_NG and out_NF
  const void* probs_N;
  FloatType prob_type;
  int64_t num_rows;
  int64_t ffn;   // F
  void* out_NF;  // result: silu(gate) times linear times the row's probability
};
LaunchError launch_swiglu(const SwigluArgs& args, const Stream& stream);

struct SwigluBackwardArgs {
  const void* grad_NF;
  const void* inner_NG;
  FloatType type;  // of grad_NF, inner_NG and grad_inner_NG
  const void* probs_N;
  FloatType prob_type;  // of probs_N and grad_probs_N
  int64_t num_rows;
  int64_t ffn;          // F
  void* grad_inner_NG;  // result
  void* grad_probs_N;   // result
};
LaunchError launch_swiglu_backward(const SwigluBackwardArgs& args, const Stream& stream);

struct ZeroEmptyGroupsArgs {
  void* grad_SMK;         // cleared where a group has no rows
  const int32_t* ends_S;  // where each group's rows end
  int64_t num_groups;
  int64_t group_bytes;  // of the M x K elements of a group
};
LaunchError launch_zero_empty_groups(const ZeroEmptyGroupsArgs& args, const Stream& stream);

// Clears the rows that no choice names: the last step of permute and of unpermute_backward.
struct ZeroUnnamedRowsArgs {
  const int32_t* rows_TK;
  int64_t num_choices;           // T x K
  const int32_t* choice_of_row;  // [N], for each row that is named a choice that names it; elsewhere anything
  void* y_NH;
  int64_t y_pitch;  // bytes from a row to the next
  int64_t num_rows;
  int64_t row_bytes;
  void* weights_N;        // a value per row that is cleared with it; nullptr: there is none
  int64_t weights_pitch;  // values from a row's to the next row's
  int weight_bytes;       // of one
};
LaunchError launch_zero_unnamed_rows(const ZeroUnnamedRowsArgs& args, const Stream& stream);
}  // namespace smartmoe::cuda
