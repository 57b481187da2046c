// Replicas for few transfers, the C++ twin of megatron_smartmoe/placement/spilled_replicas.py, which explains the
// method: same steps, same order, same choices among equals.
#include <algorithm>
#include <functional>
#include <queue>
#include <vector>

#include "planning.h"

namespace smartmoe::cpu {
namespace {
struct Piece {
  int64_t tokens, rank, slot;  // a home slot of the rank
};

// The pass over one node, whose first rank `slots` begins with.
class Spilling {
 public:
  Spilling(const std::vector<int64_t>& load_E, const SlotTable& slots)
      : slots_(slots), left_RH_(slots.num_ranks * slots.home_slots), load_R_(slots.num_ranks, 0) {
    for (int64_t rank = 0; rank < slots.num_ranks; ++rank) {
      for (int64_t slot = 0; slot < slots.home_slots; ++slot) {
        const int64_t tokens = load_E[slots.row(rank)[slot]];
        left_RH_[rank * slots.home_slots + slot] = tokens;
        load_R_[rank] += tokens;
      }
    }
  }

  void run(int64_t mean) {
    // Step 1: pieces that a rank may spill or take.
    const int64_t room = mean - *std::min_element(load_R_.begin(), load_R_.end());
    int64_t most = 0;
    for (int64_t rank = 0; rank < slots_.num_ranks; ++rank) {
      most = std::max(most, pieces_of(rank, load_R_[rank] - mean, room));
    }
    std::vector<int64_t> left_R(slots_.num_ranks, most),
        free_R(slots_.num_ranks, std::min(slots_.num_slots - slots_.home_slots, most));
    // Step 2: the next piece of every rank above the mean; the largest first, then the lowest rank.
    const auto later = [](const Piece& a, const Piece& b) {
      return a.tokens != b.tokens ? a.tokens < b.tokens : a.rank > b.rank;
    };
    std::priority_queue<Piece, std::vector<Piece>, decltype(later)> pieces(later);
    const auto cut = [&](int64_t rank) {
      const int64_t surplus = load_R_[rank] - mean;
      if (surplus <= 0 || left_R[rank] == 0) return;
      const int64_t slot = largest(rank);
      pieces.push({std::min(left_RH_[rank * slots_.home_slots + slot], surplus), rank, slot});
    };
    for (int64_t rank = 0; rank < slots_.num_ranks; ++rank) cut(rank);
    // Step 3: the largest of them goes where it fits best.
    while (!pieces.empty()) {
      const Piece piece = pieces.top();
      pieces.pop();
      const int64_t expert = slots_.row(piece.rank)[piece.slot];
      const int64_t receiver = find_receiver(expert, piece.tokens, mean, free_R);
      if (receiver < 0) continue;  // the rank keeps what it has
      const int64_t tokens = std::min(piece.tokens, mean - load_R_[receiver]);
      int64_t* row = slots_.row(receiver);
      *std::find(row + slots_.home_slots, row + slots_.num_slots, kEmpty) = expert;
      left_RH_[piece.rank * slots_.home_slots + piece.slot] -= tokens;
      load_R_[piece.rank] -= tokens;
      load_R_[receiver] += tokens;
      --left_R[piece.rank];
      --free_R[receiver];
      cut(piece.rank);
    }
  }

 private:
  // Pieces of about `room` tokens that it takes to hold a rank's surplus, the largest experts first.
  int64_t pieces_of(int64_t rank, int64_t surplus, int64_t room) const {
    const auto first = left_RH_.begin() + rank * slots_.home_slots;
    std::vector<int64_t> largest(first, first + slots_.home_slots);
    std::sort(largest.begin(), largest.end(), std::greater<>());
    int64_t count = 0;
    for (const int64_t each : largest) {
      if (surplus <= 0 || room <= 0) break;
      const int64_t tokens = std::min(each, surplus), rest = tokens % room;
      count += std::max<int64_t>(1, tokens / room + (rest >= room - rest));  // rounded
      surplus -= each;
    }
    return count;
  }

  // The home slot with the most tokens left, of those the one with the lowest expert.
  int64_t largest(int64_t rank) const {
    const int64_t *left = left_RH_.data() + rank * slots_.home_slots, *row = slots_.row(rank);
    int64_t best = 0;
    for (int64_t slot = 1; slot < slots_.home_slots; ++slot) {
      if (left[slot] > left[best] || (left[slot] == left[best] && row[slot] < row[best])) best = slot;
    }
    return best;
  }

  // The rank with the smallest gap that holds the tokens, the lowest of equals; else that with the largest, the highest
  // of equals; -1 if none may take them.
  int64_t find_receiver(int64_t expert, int64_t tokens, int64_t mean, const std::vector<int64_t>& free_R) const {
    int64_t fits = -1, largest = -1;
    for (int64_t rank = 0; rank < slots_.num_ranks; ++rank) {
      const int64_t gap = mean - load_R_[rank], *row = slots_.row(rank);
      if (gap <= 0 || free_R[rank] == 0) continue;
      const bool is_better_fit = gap >= tokens && (fits < 0 || gap < mean - load_R_[fits]);
      const bool is_larger = fits < 0 && (largest < 0 || gap >= mean - load_R_[largest]);
      if (!is_better_fit && !is_larger) continue;
      if (std::find(row, row + slots_.num_slots, expert) != row + slots_.num_slots) continue;
      if (is_better_fit) fits = rank;
      if (is_larger) largest = rank;
    }
    return fits >= 0 ? fits : largest;
  }

  const SlotTable slots_;
  std::vector<int64_t> left_RH_, load_R_;
};
}  // namespace

void spill_into_slots(const std::vector<int64_t>& load_E, const SlotTable& slots, int64_t num_nodes) {
  const int64_t per_node = slots.num_ranks / num_nodes;
  const std::vector<int64_t> bound_N = node_bounds(load_E, slots, num_nodes);
  for (int64_t node = 0; node < num_nodes; ++node) {
    const SlotTable part{slots.row(node * per_node), per_node, slots.num_slots, slots.home_slots};
    for (int64_t rank = 0; rank < per_node; ++rank) {
      std::fill(part.row(rank) + part.home_slots, part.row(rank) + part.num_slots, kEmpty);
    }
    Spilling(load_E, part).run(bound_N[node]);
  }
}
}  // namespace smartmoe::cpu
