// Replicas planned from history, the C++ twin of megatron_smartmoe/placement/plan_replicas.py:best_replicas and of the
// search beside it (placement/search), which explain the method: same steps, same order, same choices among equals.
// Loads are whole numbers, so their sums are exact in any order; numbers with fractions are computed in the twins'
// order. A set of ranks is a mask of bits, and an expert is locked into it when none of its hosts lies outside.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "planning.h"
#include "rows.h"

namespace smartmoe::cpu {
namespace {
constexpr int64_t kMeanLoad = 1000000;   // search/cuts.py:MEAN_LOAD
constexpr double kOverflowWeight = 0.1;  // search/objective.py:OVERFLOW_WEIGHT
constexpr double kResolution = 1e9;      // search/improve.py:_RESOLUTION
constexpr int64_t kAllSetsUpToRanks = 8;
constexpr int64_t kNowhere = -1;

// search/objective.py:Objective.
struct Objective {
  double worst_weight, replica_price, change_price, min_gain, enough;
  double home_price = 0.0;
};

// search/objective.py:Space.
struct Space {
  int64_t max_steps, max_experts, max_slots, trials;
  bool move_homes = false;
};

// The scenarios and the layout, which no search changes.
struct Problem {
  const int64_t* loads_KE;
  int64_t num_scenarios, num_experts, num_ranks, num_slots, home_slots, num_nodes;
  std::vector<int64_t> node_E;   // of the home
  std::vector<int64_t> peak_E;   // largest load of any scenario
  std::vector<Index> by_peak_E;  // the experts, the largest first
  Objective objective;

  int64_t node(int64_t rank) const { return rank / (num_ranks / num_nodes); }
  int64_t num_words() const { return (num_ranks + 63) / 64; }
  int64_t load(int64_t scenario, int64_t expert) const { return loads_KE[scenario * num_experts + expert]; }
};

// Sets of ranks, a row of words each.
class Masks {
 public:
  explicit Masks(int64_t num_words) : num_words_(num_words) {}

  int64_t size() const { return static_cast<int64_t>(words_.size()) / num_words_; }
  const uint64_t* row(int64_t at) const { return words_.data() + at * num_words_; }
  uint64_t* row(int64_t at) { return words_.data() + at * num_words_; }
  void resize(int64_t size) { words_.resize(size * num_words_, 0); }
  void set(int64_t at, int64_t rank) { row(at)[rank / 64] |= uint64_t{1} << (rank % 64); }
  void clear(int64_t at, int64_t rank) { row(at)[rank / 64] &= ~(uint64_t{1} << (rank % 64)); }
  bool has(int64_t at, int64_t rank) const { return (row(at)[rank / 64] >> (rank % 64) & 1) != 0; }

  // Whether `ranks` has none outside the set.
  bool contains(int64_t at, const uint64_t* ranks) const {
    for (int64_t word = 0; word < num_words_; ++word) {
      if ((ranks[word] & ~row(at)[word]) != 0) return false;
    }
    return true;
  }

 private:
  int64_t num_words_;
  std::vector<uint64_t> words_;
};

// search/cuts.py:CutPool: the sets that placements are judged by.
class CutPool {
 public:
  explicit CutPool(const Problem& problem)
      : complete(problem.num_ranks <= kAllSetsUpToRanks), sets(problem.num_words()) {
    if (complete) {
      sets.resize((int64_t{1} << problem.num_ranks) - 1);
      for (int64_t at = 0; at < sets.size(); ++at) *sets.row(at) = static_cast<uint64_t>(at) + 1;
    } else {
      sets.resize(problem.num_ranks);
      for (int64_t rank = 0; rank < problem.num_ranks; ++rank) sets.set(rank, rank);
    }
    for (int64_t at = 0; at < sets.size(); ++at) {
      int64_t size = 0;
      for (int64_t rank = 0; rank < problem.num_ranks; ++rank) size += sets.has(at, rank);
      size_Q.push_back(static_cast<double>(size));
    }
  }

  // Adds a set that is not known yet; returns whether it was new.
  bool add(const std::vector<Index>& ranks) {
    const int64_t last = sets.size();
    sets.resize(last + 1);
    for (const Index rank : ranks) sets.set(last, rank);
    for (int64_t at = 0; at < last; ++at) {
      if (size_Q[at] == static_cast<double>(ranks.size()) && sets.contains(at, sets.row(last))) {
        sets.resize(last);
        return false;
      }
    }
    size_Q.push_back(static_cast<double>(ranks.size()));
    return true;
  }

  int64_t size() const { return static_cast<int64_t>(size_Q.size()); }

  const bool complete;
  Masks sets;
  std::vector<double> size_Q;
};

// Per scenario the largest overflow and excess of a rank so far, from which the value of a placement follows.
struct Worst {
  double overflow = 0.0, makespan = 0.0;

  void add(int64_t locked, double size) {
    const double over = static_cast<double>(locked) - size * static_cast<double>(kMeanLoad);
    overflow = std::max(overflow, over);
    makespan = std::max(makespan, over / size);
  }
  double value() const { return (makespan + kOverflowWeight * overflow) / static_cast<double>(kMeanLoad); }
};

double excess_of(const std::vector<Worst>& worst_K, const Objective& objective) {
  double sum = 0.0, largest = 0.0;
  for (const Worst& worst : worst_K) {
    sum += worst.value();
    largest = std::max(largest, worst.value());
  }
  return sum / static_cast<double>(worst_K.size()) + objective.worst_weight * largest;
}

// A change of one slot, or of two that are exchanged: what search/moves.py keeps in columns.
struct Move {
  int64_t at[2];           // flat indices of the slots
  bool exchanges;          // otherwise slot at[0] gets expert[0]
  int64_t expert[2];       // kEmpty for none
  int64_t from[2], to[2];  // ranks, or kNowhere
  double price;
};

// search/improve.py:_View: a slot table and its value under the known cuts.
class View {
 public:
  View(const Problem& problem, CutPool& pool, std::vector<int64_t> slots_RS)
      : problem_(&problem), pool_(&pool), slots_RS(std::move(slots_RS)), hosts(problem.num_words()) {
    hosts.resize(problem.num_experts);
    for (size_t at = 0; at < this->slots_RS.size(); ++at) {
      if (this->slots_RS[at] != kEmpty) hosts.set(this->slots_RS[at], static_cast<int64_t>(at) / problem.num_slots);
    }
    worst_K.resize(problem.num_scenarios);
    evaluate();
  }

  // Takes the cuts in that have become known.
  void evaluate() {
    const Problem& problem = *problem_;
    const int64_t num_scenarios = problem.num_scenarios, known = num_known_;
    num_known_ = pool_->size();
    locked_QK.resize(num_known_ * num_scenarios, 0);
    for (int64_t q = known; q < num_known_; ++q) {
      int64_t* locked_K = locked_QK.data() + q * num_scenarios;
      for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
        if (!pool_->sets.contains(q, hosts.row(expert))) continue;
        for (int64_t k = 0; k < num_scenarios; ++k) locked_K[k] += problem.load(k, expert);
      }
      for (int64_t k = 0; k < num_scenarios; ++k) worst_K[k].add(locked_K[k], pool_->size_Q[q]);
    }
    excess = excess_of(worst_K, problem.objective);
  }

  // The exact excess, worst scenario first; false as soon as it must be above `limit`.
  bool ask_oracle(double limit) {
    if (!pool_->complete) {
      const Problem& problem = *problem_;
      const Hosts flat = flat_hosts();
      const CutFinder finder(flat, problem.peak_E, problem.num_ranks);
      for (const int64_t k : worst_first()) {
        bool is_new = false;
        const int64_t* load_E = problem.loads_KE + k * problem.num_experts;
        for (const std::vector<Index>& cut : finder.cuts(load_E)) is_new = pool_->add(cut) || is_new;
        if (is_new) evaluate();
        if (excess > limit) return false;
      }
    }
    return excess <= limit;
  }

  // Experts locked into a set that decides the makespan or the overflow of a scenario, the largest first.
  std::vector<int64_t> wanted_experts(int64_t most) const {
    std::vector<uint8_t> binds_Q(num_known_, 0);
    for (int64_t k = 0; k < problem_->num_scenarios; ++k) {
      if (worst_K[k].overflow <= 0) continue;
      binds_Q[first_largest(k, [](double overflow, double) { return overflow; })] = 1;
      binds_Q[first_largest(k, [](double overflow, double size) { return overflow / size; })] = 1;
    }
    std::vector<int64_t> wanted;
    for (const Index expert : problem_->by_peak_E) {
      if (static_cast<int64_t>(wanted.size()) == most || problem_->peak_E[expert] <= 0) break;
      for (int64_t q = 0; q < num_known_; ++q) {
        if (!binds_Q[q] || !pool_->sets.contains(q, hosts.row(expert))) continue;
        wanted.push_back(expert);
        break;
      }
    }
    return wanted;
  }

  // The excess after each move under the known cuts. A move changes few sets; of the others only the largest count.
  std::vector<double> judge(const std::vector<Move>& moves) const {
    std::vector<double> value_M;
    value_M.reserve(moves.size());
    const int64_t num_scenarios = problem_->num_scenarios;
    const Largest largest(*this);
    std::vector<Worst> worst(num_scenarios);
    std::vector<Change> changed;
    std::vector<uint8_t> changed_Q(num_known_, 0);
    std::vector<uint64_t> after(2 * problem_->num_words());
    for (const Move& move : moves) {
      find_changes(move, after, changed);
      for (const Change& change : changed) changed_Q[change.set] = 1;
      for (int64_t k = 0; k < num_scenarios; ++k) {
        worst[k] = largest.without(k, changed_Q);
        for (const Change& change : changed) {
          int64_t locked = locked_QK[change.set * num_scenarios + k];
          for (int column = 0; column < 2; ++column) {
            if (change.sign[column] != 0) locked += change.sign[column] * problem_->load(k, move.expert[column]);
          }
          worst[k].add(locked, pool_->size_Q[change.set]);
        }
      }
      for (const Change& change : changed) changed_Q[change.set] = 0;
      value_M.push_back(excess_of(worst, problem_->objective));
    }
    return value_M;
  }

  // Max / mean tokens per rank in each scenario.
  std::vector<double> imbalance() const {
    std::vector<double> imbalance_K;
    for (int64_t k = 0; k < problem_->num_scenarios; ++k) {
      double largest = 0.0;
      for (int64_t q = 0; q < num_known_; ++q) {
        largest = std::max(largest, static_cast<double>(locked_QK[q * problem_->num_scenarios + k]) / pool_->size_Q[q]);
      }
      imbalance_K.push_back(std::max(largest / static_cast<double>(kMeanLoad), 1.0));
    }
    return imbalance_K;
  }

  View with(const Move& move) const {
    std::vector<int64_t> changed_RS = slots_RS;
    if (move.exchanges) {
      std::swap(changed_RS[move.at[0]], changed_RS[move.at[1]]);
      for (const int64_t at : move.at) clear_beside_home(changed_RS, at);
    } else {
      changed_RS[move.at[0]] = move.expert[0];
    }
    return View(*problem_, *pool_, std::move(changed_RS));
  }

  bool may(int64_t expert, int64_t rank) const {
    return problem_->node_E[expert] == problem_->node(rank) && !hosts.has(expert, rank);
  }

 private:
  const Problem* problem_;
  CutPool* pool_;
  int64_t num_known_ = 0;

 public:
  std::vector<int64_t> slots_RS;
  Masks hosts;
  std::vector<int64_t> locked_QK;
  std::vector<Worst> worst_K;
  double excess = 0.0;

 private:
  // The hosts of every expert as planning.h has them.
  Hosts flat_hosts() const {
    std::vector<int64_t> copy_RS = slots_RS;
    return find_placed({copy_RS.data(), problem_->num_ranks, problem_->num_slots, problem_->home_slots},
                       problem_->num_experts)
        .hosts;
  }

  std::vector<int64_t> worst_first() const {
    std::vector<double> busiest_K(problem_->num_scenarios, 0.0);
    for (int64_t q = 0; q < num_known_; ++q) {
      for (int64_t k = 0; k < problem_->num_scenarios; ++k) {
        const double load = static_cast<double>(locked_QK[q * problem_->num_scenarios + k]) / pool_->size_Q[q];
        busiest_K[k] = std::max(busiest_K[k], load);
      }
    }
    std::vector<int64_t> order(problem_->num_scenarios);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return busiest_K[a] > busiest_K[b]; });
    return order;
  }

  template <class F>
  int64_t first_largest(int64_t k, F&& of) const {
    int64_t best = 0;
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t q = 0; q < num_known_; ++q) {
      const double value = of(overflow(q, k), pool_->size_Q[q]);
      if (value > most) {
        most = value;
        best = q;
      }
    }
    return best;
  }

  // A replica on the rank where its own home has arrived is cleared.
  void clear_beside_home(std::vector<int64_t>& changed_RS, int64_t at) const {
    const int64_t num_slots = problem_->num_slots, home_slots = problem_->home_slots;
    if (at % num_slots >= home_slots) return;
    const auto row = changed_RS.begin() + at / num_slots * num_slots;
    std::replace(row + home_slots, row + num_slots, changed_RS[at], kEmpty);
  }

  // A set that becomes (1) or is no longer (-1) one that all hosts of a move's experts are in.
  struct Change {
    int64_t set;
    int sign[2];  // of each expert
  };

  // `after` is scratch for the hosts of both experts.
  void find_changes(const Move& move, std::vector<uint64_t>& after, std::vector<Change>& changed) const {
    const int64_t num_words = problem_->num_words();
    uint64_t* const after_2[2] = {after.data(), after.data() + num_words};
    for (int column = 0; column < 2; ++column) {
      if (move.expert[column] == kEmpty) continue;
      std::copy_n(hosts.row(move.expert[column]), num_words, after_2[column]);
      const int64_t from = move.from[column], to = move.to[column];
      if (from != kNowhere) after_2[column][from / 64] &= ~(uint64_t{1} << (from % 64));
      if (to != kNowhere) after_2[column][to / 64] |= uint64_t{1} << (to % 64);
    }
    changed.clear();
    for (int64_t q = 0; q < num_known_; ++q) {
      Change change{q, {0, 0}};
      for (int column = 0; column < 2; ++column) {
        const int64_t expert = move.expert[column];
        if (expert == kEmpty) continue;
        change.sign[column] = pool_->sets.contains(q, after_2[column]) - pool_->sets.contains(q, hosts.row(expert));
      }
      if (change.sign[0] != 0 || change.sign[1] != 0) changed.push_back(change);
    }
  }

  // The sets with the largest overflow and excess of a rank, by scenario.
  class Largest {
   public:
    explicit Largest(const View& view) : view_(view), top_K(view.problem_->num_scenarios) {
      for (int64_t k = 0; k < static_cast<int64_t>(top_K.size()); ++k) {
        for (int64_t q = 0; q < view.num_known_; ++q) {
          const double over = view.overflow(q, k);
          top_K[k].overflow.add(q, over);
          top_K[k].makespan.add(q, over / view.pool_->size_Q[q]);
        }
      }
    }

    // Of all sets but those that are changed.
    Worst without(int64_t k, const std::vector<uint8_t>& changed_Q) const {
      Worst worst;
      const std::optional<double> overflow = top_K[k].overflow.without(changed_Q);
      const std::optional<double> makespan = top_K[k].makespan.without(changed_Q);
      if (overflow && makespan) {
        worst.overflow = std::max(worst.overflow, *overflow);
        worst.makespan = std::max(worst.makespan, *makespan);
        return worst;
      }
      for (int64_t q = 0; q < view_.num_known_; ++q) {
        if (!changed_Q[q])
          worst.add(view_.locked_QK[q * static_cast<int64_t>(top_K.size()) + k], view_.pool_->size_Q[q]);
      }
      return worst;
    }

   private:
    static constexpr int kKept = 6;

    // The largest values, in order; those that are not among them are no larger.
    struct Top {
      int size = 0;
      int64_t set[kKept];
      double value[kKept];

      void add(int64_t q, double x) {
        if (size == kKept && !(x > value[kKept - 1])) return;
        int at = size < kKept ? size++ : kKept - 1;
        for (; at > 0 && x > value[at - 1]; --at) {
          value[at] = value[at - 1];
          set[at] = set[at - 1];
        }
        value[at] = x;
        set[at] = q;
      }

      std::optional<double> without(const std::vector<uint8_t>& changed_Q) const {
        for (int at = 0; at < size; ++at) {
          if (!changed_Q[set[at]]) return value[at];
        }
        return std::nullopt;
      }
    };
    struct Tops {
      Top overflow, makespan;
    };

    const View& view_;
    std::vector<Tops> top_K;
  };

  double overflow(int64_t q, int64_t k) const {
    return static_cast<double>(locked_QK[q * problem_->num_scenarios + k]) -
           pool_->size_Q[q] * static_cast<double>(kMeanLoad);
  }
};

// search/improve.py:improve and the moves of search/moves.py.
class Improvement {
 public:
  Improvement(const Problem& problem, CutPool& pool, std::vector<int64_t> slots_RS)
      : view(problem, pool, std::move(slots_RS)), problem_(problem), start_(view.hosts) {
    view.ask_oracle(std::numeric_limits<double>::infinity());
  }

  void run(const Space& space) {
    while (steps < space.max_steps && step(space)) ++steps;
    view.evaluate();
  }

  View view;
  int64_t steps = 0;

 private:
  // Makes the best change that the oracle confirms; returns whether there was one.
  bool step(const Space& space) {
    const Objective& objective = problem_.objective;
    view.evaluate();
    const bool needed = view.excess > objective.enough;
    const std::vector<int64_t> wanted = needed ? view.wanted_experts(space.max_experts) : std::vector<int64_t>{};
    if (problem_.num_slots > problem_.home_slots && (needed || objective.replica_price > 0)) {
      const std::vector<Move> clear = clearings();
      if (needed) {
        const std::vector<int64_t> cheap = cheap_slots(clear, space.max_slots);
        if (try_moves(replacements(wanted, cheap), space) || try_moves(exchanges(wanted, cheap), space)) return true;
      }
      if (objective.replica_price > 0 && try_moves(clear, space)) return true;
    }
    return needed && space.move_homes && try_moves(home_swaps(wanted), space);
  }

  bool try_moves(const std::vector<Move>& moves, const Space& space) {
    if (moves.empty()) return false;
    view.evaluate();  // earlier trials may have added cuts to the pool
    std::vector<double> gain_M = view.judge(moves), rounded_M;
    for (size_t m = 0; m < moves.size(); ++m) {
      gain_M[m] = view.excess - gain_M[m] - moves[m].price;
      rounded_M.push_back(-std::nearbyint(gain_M[m] * kResolution));
    }
    const std::vector<size_t> order = smallest_first(rounded_M);
    for (size_t i = 0; i < std::min(order.size(), static_cast<size_t>(space.trials)); ++i) {
      const Move& move = moves[order[i]];
      if (gain_M[order[i]] <= problem_.objective.min_gain) break;
      View trial = view.with(move);
      if (!trial.ask_oracle(view.excess - move.price - problem_.objective.min_gain)) continue;
      view = std::move(trial);
      return true;
    }
    return false;
  }

  static std::vector<size_t> smallest_first(const std::vector<double>& values) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
    return order;
  }

  // Spare slots, numbered rank by rank, whose replicas are missed least; ascending.
  std::vector<int64_t> cheap_slots(const std::vector<Move>& clear, int64_t most) const {
    std::vector<double> missed = view.judge(clear);
    for (size_t m = 0; m < clear.size(); ++m) missed[m] = std::nearbyint((missed[m] + clear[m].price) * kResolution);
    const std::vector<size_t> order = smallest_first(missed);
    std::vector<int64_t> cheap(order.begin(), order.begin() + std::min(order.size(), static_cast<size_t>(most)));
    std::sort(cheap.begin(), cheap.end());
    return cheap;
  }

  int64_t num_spare() const { return problem_.num_slots - problem_.home_slots; }
  int64_t rank_of(int64_t spare) const { return spare / num_spare(); }
  int64_t flat(int64_t spare) const {
    return rank_of(spare) * problem_.num_slots + problem_.home_slots + spare % num_spare();
  }
  int64_t held(int64_t spare) const { return view.slots_RS[flat(spare)]; }
  bool is_change(int64_t expert, int64_t rank) const { return expert != kEmpty && !start_.has(expert, rank); }

  Move put(int64_t spare, int64_t expert) const {
    const int64_t old = held(spare), rank = rank_of(spare);
    const double replicas = static_cast<double>(expert != kEmpty) - static_cast<double>(old != kEmpty);
    const double changed = static_cast<double>(is_change(expert, rank)) - static_cast<double>(is_change(old, rank));
    const Objective& objective = problem_.objective;
    return {.at = {flat(spare), flat(spare)},
            .exchanges = false,
            .expert = {expert, old},
            .from = {kNowhere, rank},
            .to = {rank, kNowhere},
            .price = objective.replica_price * replicas + objective.change_price * changed};
  }

  std::vector<Move> clearings() const {
    std::vector<Move> moves;
    for (int64_t spare = 0; spare < problem_.num_ranks * num_spare(); ++spare) moves.push_back(put(spare, kEmpty));
    return moves;
  }

  std::vector<Move> replacements(const std::vector<int64_t>& wanted, const std::vector<int64_t>& cheap) const {
    std::vector<Move> moves;
    for (const int64_t expert : wanted) {
      for (const int64_t spare : cheap) {
        if (view.may(expert, rank_of(spare))) moves.push_back(put(spare, expert));
      }
    }
    return moves;
  }

  std::vector<Move> exchanges(const std::vector<int64_t>& wanted, const std::vector<int64_t>& cheap) const {
    const int64_t num_all = problem_.num_ranks * num_spare();
    std::vector<uint8_t> wanted_S(num_all, 0), cheap_S(num_all, 0);
    for (int64_t spare = 0; spare < num_all; ++spare) {
      wanted_S[spare] = std::find(wanted.begin(), wanted.end(), held(spare)) != wanted.end();
    }
    for (const int64_t spare : cheap) cheap_S[spare] = 1;
    const auto fits = [&](int64_t spare, int64_t other) {
      return held(spare) == kEmpty || view.may(held(spare), rank_of(other));
    };
    std::vector<Move> moves;
    for (int64_t first = 0; first < num_all; ++first) {
      if (!wanted_S[first]) continue;
      for (const int64_t second : cheap) {
        if (held(first) == held(second) || !fits(first, second) || !fits(second, first)) continue;
        // a pair that is listed from both sides counts from the lower one
        if (first > second && wanted_S[second] && cheap_S[first]) continue;
        moves.push_back(exchange(flat(first), flat(second), problem_.objective.change_price));
      }
    }
    return moves;
  }

  // Swaps of the home of a wanted expert with another home of the same node.
  std::vector<Move> home_swaps(const std::vector<int64_t>& wanted) const {
    const int64_t num_homes = problem_.num_ranks * problem_.home_slots;
    const auto flat = [&](int64_t home) {
      return home / problem_.home_slots * problem_.num_slots + home % problem_.home_slots;
    };
    std::vector<uint8_t> wanted_S(num_homes, 0);
    for (int64_t home = 0; home < num_homes; ++home) {
      wanted_S[home] = std::find(wanted.begin(), wanted.end(), view.slots_RS[flat(home)]) != wanted.end();
    }
    std::vector<Move> moves;
    for (int64_t first = 0; first < num_homes; ++first) {
      if (!wanted_S[first]) continue;
      for (int64_t second = 0; second < num_homes; ++second) {
        const int64_t rank = first / problem_.home_slots, other = second / problem_.home_slots;
        // a pair that is listed from both sides counts from the lower one
        if (rank == other || problem_.node(rank) != problem_.node(other) || (wanted_S[second] && first > second)) {
          continue;
        }
        Move move = exchange(flat(first), flat(second), problem_.objective.home_price);
        for (int side = 0; side < 2; ++side) {  // a home that arrives at its own replica: one host less
          if (view.hosts.has(move.expert[side], move.to[side])) move.to[side] = kNowhere;
        }
        moves.push_back(move);
      }
    }
    return moves;
  }

  // Of two slots, by their flat indices.
  Move exchange(int64_t first, int64_t second, double price) const {
    const int64_t expert[2] = {view.slots_RS[first], view.slots_RS[second]};
    const int64_t rank[2] = {first / problem_.num_slots, second / problem_.num_slots};
    int64_t changed = 0;
    for (int side = 0; side < 2; ++side) {
      changed += is_change(expert[side], rank[1 - side]) - is_change(expert[side], rank[side]);
    }
    return {.at = {first, second},
            .exchanges = true,
            .expert = {expert[0], expert[1]},
            .from = {rank[0], rank[1]},
            .to = {rank[1], rank[0]},
            .price = price * static_cast<double>(changed)};
  }

  const Problem& problem_;
  const Masks start_;
};

// plan_replicas.py:fill_spare_slots: the empty spare slots, those of the least loaded ranks first, each with a replica
// of the expert that has the largest load per host and may lie there.
void fill_empty_slots(const Problem& problem, const int64_t* load_E, std::vector<int64_t>& slots_RS) {
  Masks hosts(problem.num_words());
  hosts.resize(problem.num_experts);
  std::vector<int64_t> hosts_E(problem.num_experts, 0);
  for (size_t at = 0; at < slots_RS.size(); ++at) {
    if (slots_RS[at] == kEmpty) continue;
    hosts.set(slots_RS[at], static_cast<int64_t>(at) / problem.num_slots);
    ++hosts_E[slots_RS[at]];
  }
  std::vector<double> each_E(problem.num_experts), load_R(problem.num_ranks, 0.0);
  for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
    each_E[expert] = static_cast<double>(load_E[expert]) / static_cast<double>(hosts_E[expert]);
    for (int64_t rank = 0; rank < problem.num_ranks; ++rank) {
      if (hosts.has(expert, rank)) load_R[rank] += each_E[expert];
    }
  }
  std::vector<int64_t> order(problem.num_ranks);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return load_R[a] < load_R[b]; });
  for (const int64_t rank : order) {
    for (int64_t slot = problem.home_slots; slot < problem.num_slots; ++slot) {
      int64_t& held = slots_RS[rank * problem.num_slots + slot];
      if (held != kEmpty) continue;
      int64_t best = kEmpty;
      for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
        if (problem.node_E[expert] != problem.node(rank) || hosts.has(expert, rank)) continue;
        if (best == kEmpty || each_E[expert] > each_E[best]) best = expert;
      }
      if (best == kEmpty) continue;
      held = best;
      hosts.set(best, rank);
      each_E[best] = static_cast<double>(load_E[best]) / static_cast<double>(++hosts_E[best]);
    }
  }
}

// Price of the replicas, and of those that are new on their rank.
double price_of(const Problem& problem, const std::vector<int64_t>& slots_RS, const Masks& before) {
  int64_t replicas = 0, changed = 0;
  for (int64_t rank = 0; rank < problem.num_ranks; ++rank) {
    for (int64_t slot = problem.home_slots; slot < problem.num_slots; ++slot) {
      const int64_t expert = slots_RS[rank * problem.num_slots + slot];
      if (expert == kEmpty) continue;
      ++replicas;
      changed += !before.has(expert, rank);
    }
  }
  return problem.objective.replica_price * static_cast<double>(replicas) +
         problem.objective.change_price * static_cast<double>(changed);
}

struct Found {
  std::vector<int64_t> slots_RS;
  std::vector<double> imbalance_K;
  double excess;
  int64_t steps;
};

Found found_by(const Improvement& search) {
  return {search.view.slots_RS, search.view.imbalance(), search.view.excess, search.steps};
}

// plan_replicas.py:best_replicas. With `many` ranks both plans are only judged first, by shared cuts.
Found best_replicas(const Problem& problem, std::vector<int64_t> slots_RS, const Space& space, double good_enough,
                    bool many) {
  const Space first = {many ? 0 : space.max_steps, space.max_experts, space.max_slots, space.trials};
  CutPool pool(problem);
  // Step 1: improve the present replicas.
  Improvement kept(problem, pool, slots_RS);
  const Masks before = kept.view.hosts;
  kept.run(first);
  if (kept.view.excess <= good_enough || problem.num_slots == problem.home_slots) return found_by(kept);
  // Step 2: build a fresh plan for the likeliest load, and improve it the same way.
  const std::vector<int64_t> load_E(problem.loads_KE, problem.loads_KE + problem.num_experts);
  fill_spare_slots(load_E, {slots_RS.data(), problem.num_ranks, problem.num_slots, problem.home_slots},
                   problem.num_nodes, 0);
  if (many) fill_empty_slots(problem, load_E.data(), slots_RS);
  CutPool own_pool(problem);
  Improvement fresh(problem, many ? pool : own_pool, std::move(slots_RS));
  fresh.run(first);
  // Step 3: take the better of the two, its replicas and changes priced.
  const double fresh_cost = fresh.view.excess + price_of(problem, fresh.view.slots_RS, before);
  const double kept_cost = kept.view.excess + price_of(problem, kept.view.slots_RS, before);
  const Improvement& best = fresh_cost < kept_cost - problem.objective.min_gain ? fresh : kept;
  if (!many || best.view.excess <= good_enough) return found_by(best);
  // Step 4: on many ranks, improve the plan that was chosen.
  Improvement last(problem, pool, best.view.slots_RS);
  last.run(space);
  return found_by(last);
}

// Throws unless the loads are not negative and those of a row add up to at most 2^53: sums of them are exact.
void check_scenarios(const int64_t* loads_KE, int64_t num_scenarios, int64_t num_experts) {
  for (int64_t k = 0; k < num_scenarios; ++k) {
    int64_t left = int64_t{1} << 53;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t load = loads_KE[k * num_experts + expert];
      if (load < 0 || load > left) {
        fail("loads_KE[", k, ", ", expert, "] = ", load,
             ": a load is at least 0, and a row adds up to at most 2^53. Pass scaled loads");
      }
      left -= load;
    }
  }
}

// A problem from the tensors of an op, which it checks.
Problem make_problem(const Tensor& dense_RS, const Tensor& dense_KE, int64_t home_slots, int64_t num_nodes,
                     const Objective& objective) {
  Problem problem{.loads_KE = dense_KE.const_data_ptr<int64_t>(),
                  .num_scenarios = dense_KE.size(0),
                  .num_experts = dense_KE.size(1),
                  .num_ranks = dense_RS.size(0),
                  .num_slots = dense_RS.size(1),
                  .home_slots = home_slots,
                  .num_nodes = num_nodes,
                  .node_E = std::vector<int64_t>(dense_KE.size(1)),
                  .peak_E = std::vector<int64_t>(dense_KE.size(1), 0),
                  .by_peak_E = std::vector<Index>(dense_KE.size(1)),
                  .objective = objective};
  const int64_t* slots = dense_RS.const_data_ptr<int64_t>();
  check_placement({const_cast<int64_t*>(slots), problem.num_ranks, problem.num_slots, home_slots}, problem.num_experts);
  check_scenarios(problem.loads_KE, problem.num_scenarios, problem.num_experts);
  for (int64_t rank = 0; rank < problem.num_ranks; ++rank) {
    for (int64_t slot = 0; slot < home_slots; ++slot) {
      problem.node_E[slots[rank * problem.num_slots + slot]] = problem.node(rank);
    }
  }
  for (int64_t k = 0; k < problem.num_scenarios; ++k) {
    for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
      problem.peak_E[expert] = std::max(problem.peak_E[expert], problem.load(k, expert));
    }
  }
  std::iota(problem.by_peak_E.begin(), problem.by_peak_E.end(), 0);
  std::stable_sort(problem.by_peak_E.begin(), problem.by_peak_E.end(),
                   [&](Index a, Index b) { return problem.peak_E[a] > problem.peak_E[b]; });
  return problem;
}

std::vector<int64_t> slots_of(const Tensor& dense_RS) {
  const int64_t* slots = dense_RS.const_data_ptr<int64_t>();
  return {slots, slots + dense_RS.numel()};
}

// What an op returns: the slots, max / mean of each scenario, and the excess and the number of changes.
std::tuple<Tensor, Tensor, Tensor> to_tensors(const Found& found, const Problem& problem, const Tensor& dense_RS) {
  Tensor new_RS = torch::stable::new_empty(dense_RS, {problem.num_ranks, problem.num_slots});
  Tensor imbalance_K = torch::stable::new_empty(dense_RS, {problem.num_scenarios}, ScalarType::Double);
  Tensor value_2 = torch::stable::new_empty(dense_RS, {2}, ScalarType::Double);
  std::copy(found.slots_RS.begin(), found.slots_RS.end(), new_RS.mutable_data_ptr<int64_t>());
  std::copy(found.imbalance_K.begin(), found.imbalance_K.end(), imbalance_K.mutable_data_ptr<double>());
  value_2.mutable_data_ptr<double>()[0] = found.excess;
  value_2.mutable_data_ptr<double>()[1] = static_cast<double>(found.steps);
  return {new_RS, imbalance_K, value_2};
}
}  // namespace

std::tuple<Tensor, Tensor, Tensor> history_replicas(const Tensor& slots_RS, const Tensor& loads_KE, int64_t home_slots,
                                                    int64_t num_nodes, bool many, int64_t max_steps,
                                                    int64_t max_experts, int64_t max_slots, int64_t trials,
                                                    double good_enough, double worst_weight, double replica_price,
                                                    double change_price, double min_gain, double enough) {
  check_history_replicas(slots_RS, loads_KE, home_slots, num_nodes, max_steps, max_experts, max_slots, trials);
  const Tensor dense_RS = torch::stable::contiguous(slots_RS), dense_KE = torch::stable::contiguous(loads_KE);
  const Problem problem = make_problem(dense_RS, dense_KE, home_slots, num_nodes,
                                       {worst_weight, replica_price, change_price, min_gain, enough});
  const Space space{max_steps, max_experts, max_slots, trials};
  return to_tensors(best_replicas(problem, slots_of(dense_RS), space, good_enough, many), problem, dense_RS);
}

std::tuple<Tensor, Tensor, Tensor> swap_homes(const Tensor& slots_RS, const Tensor& loads_KE, int64_t home_slots,
                                              int64_t num_nodes, int64_t max_steps, int64_t max_experts,
                                              int64_t max_slots, int64_t trials, double worst_weight,
                                              double replica_price, double change_price, double home_price,
                                              double min_gain, double enough) {
  check_history_replicas(slots_RS, loads_KE, home_slots, num_nodes, max_steps, max_experts, max_slots, trials);
  const Tensor dense_RS = torch::stable::contiguous(slots_RS), dense_KE = torch::stable::contiguous(loads_KE);
  const Problem problem = make_problem(dense_RS, dense_KE, home_slots, num_nodes,
                                       {worst_weight, replica_price, change_price, min_gain, enough, home_price});
  CutPool pool(problem);
  Improvement search(problem, pool, slots_of(dense_RS));
  search.run({max_steps, max_experts, max_slots, trials, true});
  return to_tensors(found_by(search), problem, dense_RS);
}
}  // namespace smartmoe::cpu
