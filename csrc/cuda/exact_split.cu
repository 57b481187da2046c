// Replicas from the exact load and the split over them, by one block: csrc/cpu/exact_replicas.cpp without its search
// and csrc/cpu/min_max_split.cpp, which explain the method, to the same slot and token.
//
// Method: all threads add the counts up, then one warp plans in shared memory. What the host keeps sorted is searched
// here: the highest donor, the largest gap that a surplus fills and the emptiest host are each a reduction over the
// lanes, so a replica takes some hundred cycles whatever the number of ranks. Ties are broken by rank as the sorted
// lists break them. The pushes that level the rest, mostly none behind a fresh plan, follow one another in any case:
// one lane does them. Alternative: a parallel threshold search over quotas (UltraEP), which stops above the optimum and
// splits otherwise than the host, so that a run would depend on where it is planned.
#include "device.cuh"

namespace smartmoe::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int64_t kMost = 0x7fffffffffffffff;
constexpr int kRoot = -1, kUnseen = -2;

// A number and whose it is: ordered by the number, then by the index.
struct Key {
  int64_t value;
  int index;
};

__device__ __forceinline__ bool before(const Key& a, const Key& b) {
  return a.value != b.value ? a.value < b.value : a.index < b.index;
}

__device__ __forceinline__ Key warp_first(Key key) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const Key other{__shfl_xor_sync(kFullWarp, key.value, lanes), __shfl_xor_sync(kFullWarp, key.index, lanes)};
    if (before(other, key)) key = other;
  }
  return key;
}

__device__ __forceinline__ int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

__device__ __forceinline__ int64_t ceil_div(int64_t tokens, int64_t ranks) {
  return tokens / ranks + (tokens % ranks != 0);
}

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The plan in shared memory. C counts the filled slots, those of one expert side by side; F the experts that leave a
// choice. Everything is read and written by one warp.
struct Plan {
  int ranks, experts, slots, homes;
  // the greedy pass: what each slot holds and how many tokens of it are computed there
  int64_t *load_E, *load_R, *tokens_RS;
  int *expert_RS, *filled_R, *largest_R;
  // the split
  int64_t* share_C;
  int *begin_E, *rank_C, *slot_C, *expert_F, *order_F, *begin_R, *at_R, *flexible_C, *from_R, *hop_at_R, *hop_to_R,
      *reached_R, *seen_F;

  __device__ __forceinline__ int num_hosts(int expert) const { return begin_E[expert + 1] - begin_E[expert]; }
  __device__ __forceinline__ bool is_free(int rank) const { return filled_R[rank] < slots; }

  __device__ __forceinline__ bool holds(int rank, int expert) const {
    if (expert / homes == rank) return true;
    for (int slot = homes; slot < filled_R[rank]; ++slot) {
      if (expert_RS[rank * slots + slot] == expert) return true;
    }
    return false;
  }

  // The slot with the most tokens of a rank, of equal ones that of the lowest expert.
  __device__ __forceinline__ void find_largest(int rank) {
    int best = rank * slots;
    for (int at = best + 1; at < rank * slots + filled_R[rank]; ++at) {
      const bool more = tokens_RS[at] > tokens_RS[best];
      if (more || (tokens_RS[at] == tokens_RS[best] && expert_RS[at] < expert_RS[best])) best = at;
    }
    largest_R[rank] = best;
  }
};

// A replica to make.
struct Choice {
  int donor, receiver, expert;
  int64_t tokens;
};

// The greedy pass over the ranks of one node, [first, end).
struct Filling {
  Plan& plan;
  int first, end;
  int64_t mean;

  // The next donor behind `last`, the highest load first; its value is minus its surplus.
  __device__ __forceinline__ Key next_donor(const Key& last) const {
    Key found{kMost, 0};
    for (int rank = first + lane_id(); rank < end; rank += kWarpSize) {
      const Key key{mean - plan.load_R[rank], rank};
      if (key.value < 0 && before(last, key) && before(key, found)) found = key;
    }
    return warp_first(found);
  }

  // The receiver without the expert that has the smallest gap, or the largest one up to `limit`.
  __device__ __forceinline__ Key receiver(int expert, bool largest, int64_t limit) const {
    Key found{kMost, 0};
    for (int rank = first + lane_id(); rank < end; rank += kWarpSize) {
      const int64_t gap = mean - plan.load_R[rank];
      if (gap <= 0 || gap > limit || !plan.is_free(rank) || plan.holds(rank, expert)) continue;
      const Key key = largest ? Key{-gap, -rank} : Key{gap, rank};
      if (before(key, found)) found = key;
    }
    found = warp_first(found);
    if (largest && found.value != kMost) found = {-found.value, -found.index};
    return found;
  }

  // A gap filled from a surplus: the largest such gap of the highest donor that has one.
  __device__ __forceinline__ bool fills(Choice& choice) const {
    for (Key donor = next_donor({-kMost, 0}); donor.value != kMost; donor = next_donor(donor)) {
      const int at = plan.largest_R[donor.index], expert = plan.expert_RS[at];
      const Key gap = receiver(expert, true, smaller(-donor.value, plan.tokens_RS[at]));
      if (gap.value == kMost) continue;
      choice = {donor.index, gap.index, expert, gap.value};
      return true;
    }
    return false;
  }

  // A gap filled with more than a surplus, by as little as possible; the donor has a free slot of its own.
  __device__ __forceinline__ bool overfills(Choice& choice) const {
    int64_t least = kMost;
    for (Key donor = next_donor({-kMost, 0}); donor.value != kMost; donor = next_donor(donor)) {
      if (!plan.is_free(donor.index)) continue;
      const int at = plan.largest_R[donor.index], expert = plan.expert_RS[at];
      const Key gap = receiver(expert, false, plan.tokens_RS[at]);
      if (gap.value == kMost || gap.value + donor.value >= least) continue;
      choice = {donor.index, gap.index, expert, gap.value};
      least = gap.value + donor.value;
    }
    return least != kMost;
  }

  // As many tokens as one replica can take off a donor for a gap that stays open.
  __device__ __forceinline__ bool part(Choice& choice) const {
    int64_t most = -1;
    for (Key donor = next_donor({-kMost, 0}); donor.value != kMost; donor = next_donor(donor)) {
      const int at = plan.largest_R[donor.index], expert = plan.expert_RS[at];
      const int64_t tokens = plan.tokens_RS[at];
      const int64_t given = plan.is_free(donor.index) ? tokens : smaller(-donor.value, tokens);
      if (given <= most) continue;
      const Key gap = receiver(expert, true, kMost);
      if (gap.value == kMost) continue;
      choice = {donor.index, gap.index, expert, smaller(given, gap.value)};
      most = given;
    }
    return most >= 0;
  }

  __device__ __forceinline__ void give(const Choice& choice) const {
    const auto [donor, receiver, expert, tokens] = choice;
    __syncwarp();  // all lanes have read
    if (lane_id() == 0) {
      const int at = receiver * plan.slots + plan.filled_R[receiver]++;
      plan.tokens_RS[plan.largest_R[donor]] -= tokens;
      plan.expert_RS[at] = expert;
      plan.tokens_RS[at] = tokens;
      plan.load_R[donor] -= tokens;
      plan.load_R[receiver] += tokens;
      plan.find_largest(donor);
      plan.find_largest(receiver);
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool has_gap() const {
    bool found = false;
    for (int rank = first + lane_id(); rank < end; rank += kWarpSize) {
      found = found || (plan.load_R[rank] < mean && plan.is_free(rank));
    }
    return __ballot_sync(kFullWarp, found) != 0;
  }

  __device__ void run() const {
    Choice choice{};
    while (has_gap() && (fills(choice) || overfills(choice) || part(choice))) give(choice);
  }
};

// The homes with their loads, and empty spare slots; returns the tokens of all ranks.
__device__ int64_t start(Plan& plan) {
  int64_t total = 0;
  for (int rank = lane_id(); rank < plan.ranks; rank += kWarpSize) {
    int64_t load = 0;
    for (int slot = 0; slot < plan.homes; ++slot) {
      const int at = rank * plan.slots + slot, expert = rank * plan.homes + slot;
      plan.expert_RS[at] = expert;
      plan.tokens_RS[at] = plan.load_E[expert];
      load += plan.load_E[expert];
    }
    plan.load_R[rank] = load;
    plan.filled_R[rank] = plan.homes;
    plan.find_largest(rank);
    total += load;
  }
  __syncwarp();
  return warp_sum(total);
}

__device__ void fill_spare_slots(Plan& plan, int num_nodes, int64_t total) {
  const int per_node = plan.ranks / num_nodes;
  const int64_t mean = ceil_div(total, plan.ranks);
  for (int node = 0; node < num_nodes; ++node) {
    const int first = node * per_node, end = first + per_node;
    int64_t load = 0;
    for (int rank = first + lane_id(); rank < end; rank += kWarpSize) load += plan.load_R[rank];
    const int64_t node_mean = ceil_div(warp_sum(load), per_node);
    Filling{plan, first, end, mean > node_mean ? mean : node_mean}.run();
  }
}

// The hosts of every expert, by rank: begin_E, rank_C, slot_C.
__device__ void find_hosts(Plan& plan) {
  for (int expert = lane_id(); expert <= plan.experts; expert += kWarpSize) plan.begin_E[expert] = 0;
  __syncwarp();
  if (lane_id() == 0) {
    for (int rank = 0; rank < plan.ranks; ++rank) {
      for (int slot = 0; slot < plan.filled_R[rank]; ++slot)
        ++plan.begin_E[plan.expert_RS[rank * plan.slots + slot] + 1];
    }
    for (int expert = 0; expert < plan.experts; ++expert) plan.begin_E[expert + 1] += plan.begin_E[expert];
    // begin_E is moved to the end of each expert's hosts and then back
    for (int rank = 0; rank < plan.ranks; ++rank) {
      for (int slot = 0; slot < plan.filled_R[rank]; ++slot) {
        const int c = plan.begin_E[plan.expert_RS[rank * plan.slots + slot]]++;
        plan.rank_C[c] = rank;
        plan.slot_C[c] = slot;
      }
    }
    for (int expert = plan.experts; expert > 0; --expert) plan.begin_E[expert] = plan.begin_E[expert - 1];
    plan.begin_E[0] = 0;
  }
  __syncwarp();
}

// The experts with tokens and several hosts, those with the fewest hosts first, then with the most tokens; returns how
// many there are.
__device__ int find_flexible(Plan& plan) {
  int count = 0;
  for (int begin = 0; begin < plan.experts; begin += kWarpSize) {
    const int expert = begin + lane_id();
    const bool is_one = expert < plan.experts && plan.load_E[expert] > 0 && plan.num_hosts(expert) > 1;
    const unsigned ones = __ballot_sync(kFullWarp, is_one);
    if (is_one) plan.order_F[count + __popc(ones & ((1u << lane_id()) - 1u))] = expert;
    count += __popc(ones);
  }
  __syncwarp();
  for (int f = lane_id(); f < count; f += kWarpSize) {
    const int expert = plan.order_F[f];
    int place = 0;
    for (int other = 0; other < count; ++other) {
      const int rival = plan.order_F[other];
      const bool fewer = plan.num_hosts(rival) < plan.num_hosts(expert);
      const bool equal = plan.num_hosts(rival) == plan.num_hosts(expert);
      const bool more = plan.load_E[rival] > plan.load_E[expert];
      place += fewer || (equal && (more || (plan.load_E[rival] == plan.load_E[expert] && other < f)));
    }
    plan.expert_F[place] = expert;
  }
  __syncwarp();
  return count;
}

// The shares of flexible experts on each rank, in the order of the experts: at_R from begin_R[rank] on.
__device__ void list_by_rank(Plan& plan, int count) {
  for (int rank = lane_id(); rank <= plan.ranks; rank += kWarpSize) plan.begin_R[rank] = 0;
  __syncwarp();
  if (lane_id() == 0) {
    for (int f = 0; f < count; ++f) {
      const int expert = plan.expert_F[f];
      for (int c = plan.begin_E[expert]; c < plan.begin_E[expert + 1]; ++c) {
        plan.flexible_C[c] = f;
        ++plan.begin_R[plan.rank_C[c] + 1];
      }
    }
    for (int rank = 0; rank < plan.ranks; ++rank) plan.begin_R[rank + 1] += plan.begin_R[rank];
    for (int f = 0; f < count; ++f) {
      const int expert = plan.expert_F[f];
      for (int c = plan.begin_E[expert]; c < plan.begin_E[expert + 1]; ++c)
        plan.at_R[plan.begin_R[plan.rank_C[c]]++] = c;
    }
    for (int rank = plan.ranks; rank > 0; --rank) plan.begin_R[rank] = plan.begin_R[rank - 1];
    plan.begin_R[0] = 0;
  }
  __syncwarp();
}

// What a host has without any choice: all tokens of an expert without another host, else those of its own rank.
// Returns the bound: the mean, or the most that single hosts bring to a rank.
__device__ int64_t settle(Plan& plan, const int64_t* counts_RE, int64_t mean) {
  for (int expert = lane_id(); expert < plan.experts; expert += kWarpSize) {
    const int begin = plan.begin_E[expert];
    const bool single = plan.num_hosts(expert) == 1;
    for (int c = begin; c < plan.begin_E[expert + 1]; ++c) {
      plan.share_C[c] = single ? plan.load_E[expert] : counts_RE[int64_t{plan.rank_C[c]} * plan.experts + expert];
    }
  }
  int64_t busiest = 0;
  for (int rank = lane_id(); rank < plan.ranks; rank += kWarpSize) {
    int64_t load = 0;
    for (int expert = rank * plan.homes; expert < (rank + 1) * plan.homes; ++expert) {
      if (plan.num_hosts(expert) == 1) load += plan.load_E[expert];
    }
    plan.load_R[rank] = load;
    if (load > busiest) busiest = load;
  }
  __syncwarp();
  const int64_t most = -warp_first({-busiest, 0}).value;
  for (int rank = lane_id(); rank < plan.ranks; rank += kWarpSize) {
    for (int i = plan.begin_R[rank]; i < plan.begin_R[rank + 1]; ++i) plan.load_R[rank] += plan.share_C[plan.at_R[i]];
  }
  __syncwarp();
  return mean > most ? mean : most;
}

// The tokens of an expert that are on none of its hosts go to the emptiest of them up to the bound, a rest to the
// first.
__device__ void spread(Plan& plan, int expert, int64_t bound) {
  const int begin = plan.begin_E[expert], end = plan.begin_E[expert + 1];
  int64_t local = 0;
  for (int c = begin + lane_id(); c < end; c += kWarpSize) local += plan.share_C[c];
  int64_t rest = plan.load_E[expert] - warp_sum(local);
  if (rest == 0) return;
  unsigned taken = 0;  // this lane's hosts that have been chosen, a bit each
  int emptiest = -1;
  while (true) {
    Key found{kMost, 0};
    for (int i = 0, c = begin + lane_id(); c < end; ++i, c += kWarpSize) {
      const Key key{plan.load_R[plan.rank_C[c]], c};
      if ((taken >> i & 1u) == 0 && before(key, found)) found = key;
    }
    found = warp_first(found);
    if (emptiest < 0) emptiest = found.index;
    const int64_t room = found.value == kMost ? 0 : smaller(rest, bound - found.value);
    if (room <= 0) break;
    if ((found.index - begin) % kWarpSize == lane_id()) {
      taken |= 1u << (found.index - begin) / kWarpSize;
      plan.share_C[found.index] += room;
      plan.load_R[plan.rank_C[found.index]] += room;
    }
    rest -= room;
  }
  __syncwarp();
  if (lane_id() == 0) {
    plan.share_C[emptiest] += rest;
    plan.load_R[plan.rank_C[emptiest]] += rest;
  }
  __syncwarp();
}

// Ranks that tokens of overloaded ranks can get to, breadth first; returns how many.
__device__ int reach(Plan& plan, int count, int64_t bound) {
  int reached = 0;
  for (int rank = 0; rank < plan.ranks; ++rank) {
    plan.from_R[rank] = plan.load_R[rank] > bound ? kRoot : kUnseen;
    if (plan.load_R[rank] > bound) plan.reached_R[reached++] = rank;
  }
  if (reached == 0) return 0;
  for (int f = 0; f < count; ++f) plan.seen_F[f] = 0;
  for (int next = 0; next < reached; ++next) {
    const int rank = plan.reached_R[next];
    for (int i = plan.begin_R[rank]; i < plan.begin_R[rank + 1]; ++i) {
      const int at = plan.at_R[i], f = plan.flexible_C[at], expert = plan.expert_F[f];
      if (plan.seen_F[f] != 0 || plan.share_C[at] == 0) continue;
      plan.seen_F[f] = 1;
      for (int to = plan.begin_E[expert]; to < plan.begin_E[expert + 1]; ++to) {
        const int target = plan.rank_C[to];
        if (plan.from_R[target] != kUnseen) continue;
        plan.from_R[target] = rank;
        plan.hop_at_R[target] = at;
        plan.hop_to_R[target] = to;
        plan.reached_R[reached++] = target;
      }
    }
  }
  return reached;
}

// Moves as many tokens as the path to `end` takes; false when an earlier push has used it up.
__device__ bool push(Plan& plan, int end, int64_t bound) {
  int64_t amount = bound - plan.load_R[end];
  int rank = end;
  for (; plan.from_R[rank] != kRoot; rank = plan.from_R[rank])
    amount = smaller(amount, plan.share_C[plan.hop_at_R[rank]]);
  amount = smaller(amount, plan.load_R[rank] - bound);
  if (amount <= 0) return false;
  plan.load_R[rank] -= amount;
  plan.load_R[end] += amount;
  for (rank = end; plan.from_R[rank] != kRoot; rank = plan.from_R[rank]) {
    plan.share_C[plan.hop_at_R[rank]] -= amount;
    plan.share_C[plan.hop_to_R[rank]] += amount;
  }
  return true;
}

// Pushes tokens until no rank is above the bound, raising it only where no split could keep it.
__device__ void level(Plan& plan, int count, int64_t bound) {
  while (const int reached = reach(plan, count, bound)) {
    bool pushed = false;
    for (int i = 0; i < reached; ++i) {
      const int rank = plan.reached_R[i];
      if (plan.load_R[rank] < bound) pushed = push(plan, rank, bound) || pushed;
    }
    if (pushed) continue;
    int64_t sum = 0;
    for (int i = 0; i < reached; ++i) sum += plan.load_R[plan.reached_R[i]];
    bound = ceil_div(sum, reached);
  }
}

// Memory of one array after the other.
struct Memory {
  unsigned char* next;

  template <class T>
  __device__ __forceinline__ T* take(int count) {
    T* here = reinterpret_cast<T*>(next);
    next += static_cast<size_t>(count) * sizeof(T);
    return here;
  }
};

__global__ void __launch_bounds__(kThreads) plan_exact_split(ExactSplitArgs args) {
  SMARTMOE_DYNAMIC_SHARED(unsigned char, shared);
  Memory memory{shared};
  const int ranks = args.num_ranks, experts = args.num_experts, all = ranks * args.num_slots;
  const int flexible = all - experts;
  Plan plan{.ranks = ranks, .experts = experts, .slots = args.num_slots, .homes = experts / ranks};
  plan.load_E = memory.take<int64_t>(experts), plan.load_R = memory.take<int64_t>(ranks);
  plan.tokens_RS = memory.take<int64_t>(all);
  plan.share_C = plan.tokens_RS;  // the greedy pass is over when the split begins
  plan.expert_RS = memory.take<int>(all), plan.filled_R = memory.take<int>(ranks);
  plan.largest_R = memory.take<int>(ranks), plan.begin_E = memory.take<int>(experts + 1);
  plan.rank_C = memory.take<int>(all), plan.slot_C = memory.take<int>(all), plan.flexible_C = memory.take<int>(all);
  plan.expert_F = memory.take<int>(flexible), plan.order_F = memory.take<int>(flexible);
  plan.seen_F = memory.take<int>(flexible), plan.begin_R = memory.take<int>(ranks + 1);
  plan.at_R = memory.take<int>(2 * flexible), plan.from_R = memory.take<int>(ranks);
  plan.hop_at_R = memory.take<int>(ranks), plan.hop_to_R = memory.take<int>(ranks);
  plan.reached_R = memory.take<int>(ranks);

  for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += kThreads) {
    int64_t load = 0;
    for (int rank = 0; rank < ranks; ++rank) load += args.counts_RE[int64_t{rank} * experts + expert];
    plan.load_E[expert] = load;
  }
  __syncthreads();
  if (warp_id() != 0) return;

  // Step 1: the replicas.
  const int64_t total = start(plan);
  fill_spare_slots(plan, args.num_nodes, total);
  // Step 2: the split over them, as min_max_split makes it.
  find_hosts(plan);
  const int count = find_flexible(plan);
  list_by_rank(plan, count);
  const int64_t bound = settle(plan, args.counts_RE, ceil_div(total, ranks));
  for (int f = 0; f < count; ++f) spread(plan, plan.expert_F[f], bound);
  if (lane_id() == 0) level(plan, count, bound);
  // Step 3: what each slot holds and takes.
  for (int at = lane_id(); at < all; at += kWarpSize) {
    const bool is_filled = at % plan.slots < plan.filled_R[at / plan.slots];
    args.slots_RS[at] = is_filled ? plan.expert_RS[at] : -1;
    args.tokens_RS[at] = 0;
  }
  __syncwarp();
  for (int c = lane_id(); c < plan.begin_E[experts]; c += kWarpSize) {
    args.tokens_RS[plan.rank_C[c] * plan.slots + plan.slot_C[c]] = plan.share_C[c];
  }
}
}  // namespace

int64_t exact_split_shared_bytes(int64_t num_ranks, int64_t num_experts, int64_t num_slots) {
  const int64_t all = num_ranks * num_slots, flexible = all - num_experts;
  const int64_t wide = num_experts + num_ranks + all;
  const int64_t narrow =
      4 * all + 2 * num_ranks + num_experts + 1 + 3 * flexible + num_ranks + 1 + 2 * flexible + 4 * num_ranks;
  return 8 * wide + 4 * narrow;
}

LaunchError launch_exact_split(const ExactSplitArgs& args, const Stream& stream) {
  if (const LaunchError error = set_device(stream)) return error;
  const int64_t bytes = exact_split_shared_bytes(args.num_ranks, args.num_experts, args.num_slots);
  SMARTMOE_LAUNCH(plan_exact_split, dim3(1), dim3(kThreads), static_cast<size_t>(bytes), stream.handle, args);
  return last_launch_error();
}
}  // namespace smartmoe::cuda
