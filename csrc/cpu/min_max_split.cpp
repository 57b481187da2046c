// The split with the smallest possible largest rank load, the C++ twin of megatron_smartmoe/placement/split.py, which
// explains the method: same steps, same order, same choices among equals. Only the state is kept differently: lists of
// lists become flat vectors, and a share is named by its position among the hosts of all flexible experts (axis C). A
// host is a rank that holds an expert, as its home or as a replica.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
// The experts that leave a choice, and their hosts.
struct Graph {
  std::vector<Index> expert_F;            // fewest hosts first, then most tokens, then in order of the experts
  std::vector<Index> begin_F, rank_C;     // the ranks of flexible expert f, ascending
  std::vector<Index> flexible_C;          // the flexible expert of position c
  std::vector<Index> begin_R, on_rank_C;  // the positions on rank r, in order
};

struct Hop {
  Index from_rank, at, to;  // the rank that the hop leaves, the share there, the share at the new rank
};

constexpr Index kUnseen = -2;
constexpr Index kRoot = -1;  // as Hop::from_rank: the path begins here

// Whether the counts, none of them negative, add up to more than int64 holds.
bool overflows(const Counts& counts) {
  int64_t left = kMaxTokens;
  for (int64_t rank = 0; rank < counts.num_ranks; ++rank) {
    for (int64_t expert = 0; expert < counts.num_experts; ++expert) {
      const int64_t count = counts.row(rank)[expert];
      if (count > left) return true;
      left -= count;
    }
  }
  return false;
}

[[noreturn]] void fail_negative(const char* name, const Counts& counts) {
  for (int64_t rank = 0;; ++rank) {
    const int64_t* counts_E = counts.row(rank);
    const int64_t expert =
        std::find_if(counts_E, counts_E + counts.num_experts, [](int64_t n) { return n < 0; }) - counts_E;
    if (expert == counts.num_experts) continue;
    fail(name, "[", rank, ", ", expert, "] = ", counts_E[expert],
         ": a number of tokens is at least 0. Pass counts of tokens");
  }
}

Hosts find_hosts(const uint8_t* hosts_ER, int64_t num_experts, int64_t num_ranks) {
  Hosts hosts;
  hosts.begin_E.reserve(num_experts + 1);
  hosts.rank_C.reserve(2 * num_experts);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    hosts.begin_E.push_back(static_cast<Index>(hosts.rank_C.size()));
    const uint8_t* row = hosts_ER + expert * num_ranks;
    int64_t rank = 0;
    while (rank < num_ranks) {
      uint64_t eight = 0;  // most are empty: look at eight at once
      if (rank + 8 <= num_ranks) {
        std::memcpy(&eight, row + rank, 8);
        if (eight == 0) {
          rank += 8;
          continue;
        }
      }
      const int64_t end = std::min(rank + 8, num_ranks);
      for (; rank < end; ++rank) {
        if (row[rank]) hosts.rank_C.push_back(static_cast<Index>(rank));
      }
    }
  }
  hosts.begin_E.push_back(static_cast<Index>(hosts.rank_C.size()));
  return hosts;
}

// Flexible experts are those with tokens and two hosts or more.
std::vector<Index> flexible_experts(const Hosts& hosts, const std::vector<int64_t>& load_E) {
  std::vector<Index> expert_F;
  for (Index expert = 0; expert < static_cast<Index>(load_E.size()); ++expert) {
    if (load_E[expert] <= 0) continue;
    if (hosts.num_hosts(expert) == 0)
      fail("expert ", expert, " has ", load_E[expert], " tokens and no slot on any rank");
    if (hosts.num_hosts(expert) > 1) expert_F.push_back(expert);
  }
  std::sort(expert_F.begin(), expert_F.end(), [&](Index a, Index b) {
    if (hosts.num_hosts(a) != hosts.num_hosts(b)) return hosts.num_hosts(a) < hosts.num_hosts(b);
    if (load_E[a] != load_E[b]) return load_E[a] > load_E[b];
    return a < b;
  });
  return expert_F;
}

Graph make_graph(const Hosts& hosts, const std::vector<int64_t>& load_E, int64_t num_ranks) {
  Graph graph;
  graph.expert_F = flexible_experts(hosts, load_E);
  graph.begin_F.push_back(0);
  for (Index f = 0; f < static_cast<Index>(graph.expert_F.size()); ++f) {
    const Index expert = graph.expert_F[f];
    for (Index c = hosts.begin_E[expert]; c < hosts.begin_E[expert + 1]; ++c) {
      graph.rank_C.push_back(hosts.rank_C[c]);
      graph.flexible_C.push_back(f);
    }
    graph.begin_F.push_back(static_cast<Index>(graph.rank_C.size()));
  }
  // a counting sort of the positions by their rank
  graph.begin_R.assign(num_ranks + 1, 0);
  for (const Index rank : graph.rank_C) ++graph.begin_R[rank + 1];
  std::partial_sum(graph.begin_R.begin(), graph.begin_R.end(), graph.begin_R.begin());
  graph.on_rank_C.resize(graph.rank_C.size());
  std::vector<Index> next_R(graph.begin_R.begin(), graph.begin_R.end() - 1);
  for (Index c = 0; c < static_cast<Index>(graph.rank_C.size()); ++c) graph.on_rank_C[next_R[graph.rank_C[c]]++] = c;
  return graph;
}

// The state of the search: tokens of each share, load of each rank, and the scratch of a breadth-first pass.
class Leveling {
 public:
  Leveling(const Graph& graph, std::vector<int64_t> load_R, std::vector<int64_t> share_C)
      : graph_(graph), load_R_(std::move(load_R)), share_C_(std::move(share_C)), hop_R_(load_R_.size()) {
    reached_.reserve(load_R_.size());
  }

  const std::vector<int64_t>& share_C() const { return share_C_; }
  const std::vector<int64_t>& load_R() const { return load_R_; }
  const std::vector<std::vector<Index>>& cuts() const { return cuts_; }

  // A first split: local tokens stay, the others go to the emptiest hosts up to the bound, a rest to the emptiest.
  void fill(const int64_t* load_E, int64_t bound) {
    for (size_t c = 0; c < share_C_.size(); ++c) load_R_[graph_.rank_C[c]] += share_C_[c];
    std::vector<std::pair<int64_t, Index>> by_load;
    for (size_t f = 0; f < graph_.expert_F.size(); ++f) {
      int64_t rest = load_E[graph_.expert_F[f]];
      by_load.clear();
      for (Index c = graph_.begin_F[f]; c < graph_.begin_F[f + 1]; ++c) {
        rest -= share_C_[c];
        by_load.emplace_back(load_R_[graph_.rank_C[c]], c);
      }
      if (rest == 0) continue;
      std::sort(by_load.begin(), by_load.end());
      for (const auto& [tokens, c] : by_load) {
        const int64_t room = std::min(rest, bound - tokens);
        if (room <= 0) break;
        add(c, room);
        rest -= room;
      }
      add(by_load.front().second, rest);
    }
  }

  // Pushes tokens until no rank is above the bound, raising it only where Hall's condition says so; returns it. The
  // sets of ranks that raised it stay in cuts().
  int64_t level(int64_t bound) {
    while (reach(bound)) {
      bool pushed = false;
      for (const Index rank : reached_) {
        if (load_R_[rank] < bound) pushed = push(rank, bound) || pushed;
      }
      if (pushed) continue;
      int64_t sum = 0;
      for (const Index rank : reached_) sum += load_R_[rank];
      bound = ceil_div(sum, static_cast<int64_t>(reached_.size()));
      cuts_.push_back(reached_);
    }
    return bound;
  }

 private:
  void add(Index c, int64_t tokens) {
    share_C_[c] += tokens;
    load_R_[graph_.rank_C[c]] += tokens;
  }

  // Ranks that tokens of overloaded ranks can get to, breadth first, with the hop that reached each; false if no rank
  // is above the bound.
  bool reach(int64_t bound) {
    reached_.clear();
    for (Index rank = 0; rank < static_cast<Index>(load_R_.size()); ++rank) {
      hop_R_[rank].from_rank = load_R_[rank] > bound ? kRoot : kUnseen;
      if (load_R_[rank] > bound) reached_.push_back(rank);
    }
    if (reached_.empty()) return false;
    seen_F_.assign(graph_.expert_F.size(), 0);
    for (size_t next = 0; next < reached_.size(); ++next) {  // grows while it is walked
      const Index rank = reached_[next];
      for (Index i = graph_.begin_R[rank]; i < graph_.begin_R[rank + 1]; ++i) {
        const Index at = graph_.on_rank_C[i], f = graph_.flexible_C[at];
        if (seen_F_[f] || share_C_[at] == 0) continue;
        seen_F_[f] = 1;
        for (Index to = graph_.begin_F[f]; to < graph_.begin_F[f + 1]; ++to) {
          const Index target = graph_.rank_C[to];
          if (hop_R_[target].from_rank != kUnseen) continue;
          hop_R_[target] = {rank, at, to};
          reached_.push_back(target);
        }
      }
    }
    return true;
  }

  // Moves as many tokens as the path to `end` takes; false when an earlier push has used it up.
  bool push(Index end, int64_t bound) {
    int64_t amount = bound - load_R_[end];
    Index rank = end;
    for (; hop_R_[rank].from_rank != kRoot; rank = hop_R_[rank].from_rank) {
      amount = std::min(amount, share_C_[hop_R_[rank].at]);
    }
    amount = std::min(amount, load_R_[rank] - bound);
    if (amount <= 0) return false;
    load_R_[rank] -= amount;
    load_R_[end] += amount;
    for (rank = end; hop_R_[rank].from_rank != kRoot; rank = hop_R_[rank].from_rank) {
      share_C_[hop_R_[rank].at] -= amount;
      share_C_[hop_R_[rank].to] += amount;
    }
    return true;
  }

  const Graph& graph_;
  std::vector<int64_t> load_R_, share_C_;
  std::vector<Hop> hop_R_;
  std::vector<Index> reached_;
  std::vector<std::vector<Index>> cuts_;
  std::vector<uint8_t> seen_F_;
};

// Tokens of the experts with one host, written to tokens_C; returns the load that they put on each rank.
std::vector<int64_t> place_fixed(const Hosts& hosts, const int64_t* load_E, int64_t num_ranks,
                                 std::vector<int64_t>& tokens_C) {
  std::vector<int64_t> base_R(num_ranks, 0);
  for (size_t expert = 0; expert + 1 < hosts.begin_E.size(); ++expert) {
    const Index begin = hosts.begin_E[expert];
    if (hosts.begin_E[expert + 1] - begin != 1) continue;
    tokens_C[begin] = load_E[expert];
    base_R[hosts.rank_C[begin]] += load_E[expert];
  }
  return base_R;
}

// The shares of the flexible experts, written to tokens_C.
void copy_shares(const Graph& graph, const Leveling& leveling, const Hosts& hosts, std::vector<int64_t>& tokens_C) {
  const auto shares = leveling.share_C().begin();
  for (size_t f = 0; f < graph.expert_F.size(); ++f) {
    std::copy(shares + graph.begin_F[f], shares + graph.begin_F[f + 1],
              tokens_C.begin() + hosts.begin_E[graph.expert_F[f]]);
  }
}
}  // namespace

std::vector<int64_t> total_load(const char* name, const Counts& counts) {
  std::vector<int64_t> load_E(counts.num_experts, 0);
  int64_t bits = 0;  // of all counts: negative if one of them is, and at least as large as the largest
  for (int64_t rank = 0; rank < counts.num_ranks; ++rank) {
    const int64_t* counts_E = counts.row(rank);
    for (int64_t expert = 0; expert < counts.num_experts; ++expert) {
      // unsigned: an overflow is found below, and must not be undefined here
      load_E[expert] =
          static_cast<int64_t>(static_cast<uint64_t>(load_E[expert]) + static_cast<uint64_t>(counts_E[expert]));
      bits |= counts_E[expert];
    }
  }
  const int64_t num_counts = counts.num_ranks * counts.num_experts;
  if (bits < 0) fail_negative(name, counts);
  if (bits > 0 && bits > kMaxTokens / num_counts && overflows(counts)) fail_overflow(name);
  return load_E;
}

std::vector<int64_t> split_over_hosts(const Counts& counts, const Hosts& hosts, const std::vector<int64_t>& load_E) {
  // Step 1: experts with one host are settled; the others form the graph.
  const Graph graph = make_graph(hosts, load_E, counts.num_ranks);
  std::vector<int64_t> tokens_C(hosts.rank_C.size(), 0);
  std::vector<int64_t> base_R = place_fixed(hosts, load_E.data(), counts.num_ranks, tokens_C);
  if (graph.expert_F.empty()) return tokens_C;
  // Step 2: a lower bound: the mean, rounded up, or the most that single hosts already bring to a rank.
  const int64_t mean = ceil_div(std::accumulate(load_E.begin(), load_E.end(), int64_t{0}), counts.num_ranks);
  const int64_t bound = std::max(mean, *std::max_element(base_R.begin(), base_R.end()));
  // Step 3: a first split: local tokens stay, the others fill the emptiest hosts up to the bound.
  const int64_t num_shares = static_cast<int64_t>(graph.rank_C.size());
  std::vector<int64_t> local_C(num_shares);
  for (int64_t c = 0; c < num_shares; ++c) {
    local_C[c] = counts.row(graph.rank_C[c])[graph.expert_F[graph.flexible_C[c]]];
  }
  Leveling leveling(graph, std::move(base_R), std::move(local_C));
  leveling.fill(load_E.data(), bound);
  // Step 4: push tokens from ranks above the bound to ranks below it, raising it only where no split could keep it.
  leveling.level(bound);
  copy_shares(graph, leveling, hosts, tokens_C);
  return tokens_C;
}

Balance best_balance(const Hosts& hosts, const std::vector<int64_t>& load_E, int64_t num_ranks) {
  const Graph graph = make_graph(hosts, load_E, num_ranks);
  std::vector<int64_t> tokens_C(hosts.rank_C.size(), 0);
  std::vector<int64_t> base_R = place_fixed(hosts, load_E.data(), num_ranks, tokens_C);
  const int64_t mean = ceil_div(std::accumulate(load_E.begin(), load_E.end(), int64_t{0}), num_ranks);
  Leveling leveling(graph, std::move(base_R), std::vector<int64_t>(graph.rank_C.size(), 0));
  leveling.fill(load_E.data(), mean);
  const int64_t bound = leveling.level(mean);
  copy_shares(graph, leveling, hosts, tokens_C);
  std::vector<Index> cut;
  if (!leveling.cuts().empty()) cut = leveling.cuts().back();
  return {.bound = bound, .tokens_C = std::move(tokens_C), .load_R = leveling.load_R(), .cut = std::move(cut)};
}

struct CutFinder::State {
  Hosts hosts;
  Graph graph;
  int64_t num_ranks;
};

CutFinder::CutFinder(const Hosts& hosts, const std::vector<int64_t>& peak_E, int64_t num_ranks)
    : state_(new State{hosts, make_graph(hosts, peak_E, num_ranks), num_ranks}) {}

CutFinder::~CutFinder() = default;

std::vector<std::vector<Index>> CutFinder::cuts(const int64_t* load_E) const {
  const auto& [hosts, graph, num_ranks] = *state_;
  std::vector<int64_t> tokens_C(hosts.rank_C.size(), 0);
  std::vector<int64_t> base_R = place_fixed(hosts, load_E, num_ranks, tokens_C);
  const int64_t num_experts = static_cast<int64_t>(hosts.begin_E.size()) - 1;
  const int64_t mean = ceil_div(std::accumulate(load_E, load_E + num_experts, int64_t{0}), num_ranks);
  Leveling leveling(graph, std::move(base_R), std::vector<int64_t>(graph.rank_C.size(), 0));
  leveling.fill(load_E, mean);
  leveling.level(mean);
  return leveling.cuts();
}

Tensor min_max_split(const Tensor& counts_RE, const Tensor& hosts_ER) {
  check_split(counts_RE, hosts_ER);
  const Tensor dense_RE = torch::stable::contiguous(counts_RE);
  const Tensor dense_ER = torch::stable::contiguous(hosts_ER);
  const int64_t num_ranks = counts_RE.size(0), num_experts = counts_RE.size(1);
  const Counts counts{dense_RE.const_data_ptr<int64_t>(), num_ranks, num_experts, num_experts};
  const std::vector<int64_t> load_E = total_load("counts_RE", counts);
  const Hosts hosts = find_hosts(static_cast<const uint8_t*>(dense_ER.const_data_ptr()), num_experts, num_ranks);
  const std::vector<int64_t> tokens_C = split_over_hosts(counts, hosts, load_E);

  Tensor tokens_ER = torch::stable::new_zeros(dense_RE, {num_experts, num_ranks});
  int64_t* tokens = tokens_ER.mutable_data_ptr<int64_t>();
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    for (Index c = hosts.begin_E[expert]; c < hosts.begin_E[expert + 1]; ++c) {
      tokens[expert * num_ranks + hosts.rank_C[c]] = tokens_C[c];
    }
  }
  return tokens_ER;
}
}  // namespace smartmoe::cpu
