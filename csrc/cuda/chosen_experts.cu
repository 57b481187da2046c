// The experts of each token and their weights, from the router's map, and the gradient's way back.
//
// Method: a warp per token. It reads the token's part of the map 32 experts at a time; a vote gives each chosen expert
// its place among the token's choices, in ascending order. Weights are moved as bits, whatever their type.
// Alternative: a top-k over keys that fall with the expert's number, which sorts what needs no sorting.
#include "rows.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The token of this warp; behind the last one there is nothing to do, for all of its lanes alike.
__device__ __forceinline__ int64_t token_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    find_chosen(const uint8_t* __restrict__ map, const Bits* __restrict__ probs, int64_t num_tokens, int num_experts,
                int top_k, int32_t* __restrict__ ids, Bits* __restrict__ weights) {
  const int64_t token = token_of_warp();
  if (token >= num_tokens) return;
  const uint8_t* chosen = map + token * num_experts;
  int choices = 0;
  // `begin` and `choices` are the same for the whole warp, so all 32 lanes reach every __ballot_sync
  for (int begin = 0; begin < num_experts && choices < top_k; begin += kWarpSize) {
    const int expert = begin + lane_id();
    const bool is_chosen = expert < num_experts && chosen[expert] != 0;
    const unsigned votes = __ballot_sync(kFullWarp, is_chosen);
    const int choice = choices + __popc(votes & ((1u << lane_id()) - 1u));
    if (is_chosen && choice < top_k) {
      ids[token * top_k + choice] = expert;
      weights[token * top_k + choice] = probs[token * num_experts + expert];
    }
    choices += __popc(votes);
  }
  for (int choice = choices + lane_id(); choice < top_k; choice += kWarpSize) {
    ids[token * top_k + choice] = num_experts;
    weights[token * top_k + choice] = Bits{};
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    return_gradients(const Bits* __restrict__ grads, const int32_t* __restrict__ ids, int64_t num_tokens, int top_k,
                     int num_experts, Bits* __restrict__ to) {
  const int64_t token = token_of_warp();
  if (token >= num_tokens) return;
  Bits* row = to + token * num_experts;
  for (int expert = lane_id(); expert < num_experts; expert += kWarpSize) row[expert] = Bits{};
  __syncwarp();  // a gradient is written where another lane has written a zero
  for (int choice = lane_id(); choice < top_k; choice += kWarpSize) {
    const int32_t expert = ids[token * top_k + choice];
    if (is_row(expert, num_experts)) row[expert] = grads[token * top_k + choice];
  }
}

dim3 blocks_for(int64_t num_tokens) {
  return dim3(static_cast<unsigned>((num_tokens + kWarps - 1) / kWarps));
}
}  // namespace

LaunchError launch_chosen_experts(const ChosenExpertsArgs& args, const Stream& stream) {
  if (args.num_tokens == 0 || args.top_k == 0) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  with_bits(args.prob_bytes, [&](auto zero) {
    using Bits = decltype(zero);
    SMARTMOE_LAUNCH(find_chosen<Bits>, blocks_for(args.num_tokens), dim3(kThreads), 0, stream.handle,
                    args.routing_map_TE, static_cast<const Bits*>(args.probs_TE), args.num_tokens, args.num_experts,
                    args.top_k, args.ids_TK, static_cast<Bits*>(args.weights_TK));
  });
  return last_launch_error();
}

LaunchError launch_chosen_experts_backward(const ChosenExpertsBackwardArgs& args, const Stream& stream) {
  if (args.num_tokens == 0 || args.num_experts == 0) return nullptr;
  if (const LaunchError error = set_device(stream)) return error;
  with_bits(args.grad_bytes, [&](auto zero) {
    using Bits = decltype(zero);
    SMARTMOE_LAUNCH(return_gradients<Bits>, blocks_for(args.num_tokens), dim3(kThreads), 0, stream.handle,
                    static_cast<const Bits*>(args.grad_TK), args.ids_TK, args.num_tokens, args.top_k, args.num_experts,
                    static_cast<Bits*>(args.grad_TE));
  });
  return last_launch_error();
}
}  // namespace smartmoe::cuda
