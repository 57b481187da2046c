// Which source rank's tokens go to which host: placement/split.py:assign_sources. What is made of that the caller says:
// one rank's segments, or the traffic of all.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "planning.h"

namespace smartmoe::cpu {
// The product may have more than 64 bits.
inline int64_t in_proportion(int64_t at, int64_t supply, int64_t total) {
  return static_cast<int64_t>(static_cast<__int128>(at) * supply / total);
}

// Record is called with a source rank, a host and the tokens that they share, of the experts with several hosts.
template <class Record>
class Sources {
 public:
  Sources(const Counts& counts, const Hosts& hosts, Record record)
      : counts_(counts), hosts_(hosts), record_(std::move(record)) {}

  // tokens_C is what each host takes; it is used up.
  void assign(std::vector<int64_t>& tokens_C, int64_t num_nodes) {
    // Step 1: the experts with several hosts; one with a single host gets every token there, which the caller settles.
    gather_left();
    for (size_t f = 0; f < expert_F_.size(); ++f) {
      const Index begin = hosts_.begin_E[expert_F_[f]], end = hosts_.begin_E[expert_F_[f] + 1];
      int64_t* left_R = left_FR_.data() + f * counts_.num_ranks;
      // Step 2: on several nodes, what each host takes from its own; else all.
      later_C_.assign(end - begin, 0);
      if (num_nodes > 1) put_off(begin, end, left_R, tokens_C, counts_.num_ranks / num_nodes);
      // Step 3: tokens that are already on a host of their expert stay there, then sources of the same node are met.
      for (Index c = begin; c < end; ++c) {
        const Index rank = hosts_.rank_C[c];
        meet(left_R[rank], rank, tokens_C[c], c);
      }
      if (num_nodes > 1) meet_by_node(begin, end, left_R, tokens_C, counts_.num_ranks / num_nodes);
      // Step 4: then all sources.
      for (Index c = begin; c < end; ++c) tokens_C[c] += later_C_[c - begin];
      meet_in_order(begin, end, left_R, 0, counts_.num_ranks, tokens_C);
    }
  }

 private:
  // What each source still has of the experts with several hosts; row by row, as the counts lie in memory.
  void gather_left() {
    expert_F_.clear();
    for (int64_t expert = 0; expert < counts_.num_experts; ++expert) {
      if (hosts_.num_hosts(expert) > 1) expert_F_.push_back(static_cast<Index>(expert));
    }
    left_FR_.resize(expert_F_.size() * counts_.num_ranks);
    for (int64_t source = 0; source < counts_.num_ranks; ++source) {
      const int64_t* counts_E = counts_.row(source);
      for (size_t f = 0; f < expert_F_.size(); ++f) left_FR_[f * counts_.num_ranks + source] = counts_E[expert_F_[f]];
    }
  }

  // One source and one host meet: as many tokens as both have move.
  void meet(int64_t& left, int64_t source, int64_t& need, Index c) {
    const int64_t tokens = std::min(left, need);
    left -= tokens;
    need -= tokens;
    record_(source, c, tokens);
  }

  // Supply and demand laid end to end: the sources in [source, end_source) and the hosts in [c, end).
  void meet_in_order(Index c, Index end, int64_t* left_R, int64_t source, int64_t end_source,
                     std::vector<int64_t>& need_C) {
    while (c < end && source < end_source) {
      if (need_C[c] == 0) {
        ++c;
      } else if (left_R[source] == 0) {
        ++source;
      } else {
        meet(left_R[source], source, need_C[c], c);
      }
    }
  }

  // The hosts from `begin` on that are on the same node as that one: up to which.
  Index end_of_node(Index begin, Index end, int64_t per_node) const {
    const int64_t node = hosts_.rank_C[begin] / per_node;
    while (begin < end && hosts_.rank_C[begin] / per_node == node) ++begin;
    return begin;
  }

  // Put off what hosts take from other nodes: the same share of each need where the node has less than they take.
  void put_off(Index begin, Index end, const int64_t* left_R, std::vector<int64_t>& need_C, int64_t per_node) {
    for (Index c = begin; c < end;) {
      const int64_t* node_R = left_R + hosts_.rank_C[c] / per_node * per_node;
      const int64_t supply = std::accumulate(node_R, node_R + per_node, int64_t{0});
      const Index next = end_of_node(c, end, per_node);
      const int64_t total = std::accumulate(need_C.begin() + c, need_C.begin() + next, int64_t{0});
      int64_t before = 0;
      for (; c < next; ++c) {
        if (supply >= total) continue;
        const int64_t after = before + need_C[c];
        const int64_t now = in_proportion(after, supply, total) - in_proportion(before, supply, total);
        later_C_[c - begin] = need_C[c] - now;
        need_C[c] = now;
        before = after;
      }
    }
  }

  void meet_by_node(Index begin, Index end, int64_t* left_R, std::vector<int64_t>& need_C, int64_t per_node) {
    while (begin < end) {
      const int64_t node = hosts_.rank_C[begin] / per_node;
      const Index next = end_of_node(begin, end, per_node);
      meet_in_order(begin, next, left_R, node * per_node, (node + 1) * per_node, need_C);
      begin = next;
    }
  }

  const Counts& counts_;
  const Hosts& hosts_;
  Record record_;
  std::vector<Index> expert_F_;
  std::vector<int64_t> left_FR_, later_C_;  // later: what the hosts of one expert take from other nodes
};
}  // namespace smartmoe::cpu
