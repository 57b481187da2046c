"""A bounded local search behind `exact_replicas`: replaces replicas one at a time while a rank has too many tokens.

Method. The greedy pass mostly reaches the mean load, but in bad cases it leaves up to 9.5% (128 experts on 8 ranks, one
slot). The best split then names the ranks that cannot be helped (a cut: their experts have all hosts among them), so
the only change that helps is a replica of one of those experts outside the cut. The largest of them are tried in the
slots that would be missed least: empty ones, then those whose replica takes the fewest tokens. The first change that
lowers the busiest rank is kept, and the search goes on from there, until nothing helps, the busiest rank is within a
thousandth of the bound, or the trials are used up. A trial is one exact split of the load, some microseconds in C++.

Alternatives: judging every candidate and taking the best finds the same balance with ten times the trials; pairs of
changes take another 0.05% off on average, with ten times the trials; the search of `search/`, for many loads
at once, takes milliseconds. Trials are counted, not timed: every rank must stop at the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.split import Balance, best_balance
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of

TRIALS = 16  # kTrials of csrc/cpu/planning.h
_EXPERTS, _SLOTS = 4, 8  # candidates of a step
_ENOUGH = 1000  # stop within a thousandth of the bound that no replicas could beat


def node_bounds(load_E: IntArray, homes_RH: IntArray, num_nodes: int) -> list[int]:
    """Tokens per rank, rounded up, that no replicas within nodes can take the busiest rank of each node below: the mean
    over all ranks, or over the node's where the node has more as a whole.

    Args:
        load_E: tokens of each expert.
        homes_RH: home slots of the ranks.
        num_nodes: nodes that the ranks lie on.
    """
    num_ranks = len(homes_RH)
    mean = -(-int(load_E.sum()) // num_ranks)
    load_N = load_E[homes_RH].sum(axis=1).reshape(num_nodes, -1).sum(axis=1).tolist()
    return [max(mean, -(-load // (num_ranks // num_nodes))) for load in load_N]


def improve_replicas(
    load_E: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int = 1, trials: int = TRIALS
) -> IntArray:
    """The slots with replicas replaced as long as that takes tokens off the busiest rank.

    Args:
        load_E: tokens of each expert.
        slots_RS: homes and replicas, as `exact_replicas` plans them.
        home_slots: columns of homes.
        num_nodes: nodes that the ranks lie on; a replica stays on its home's node.
        trials: most replicas that are tried.
    """
    num_ranks, num_slots = slots_RS.shape
    if trials == 0 or num_slots == home_slots or not len(load_E):
        return slots_RS
    node_R = np.arange(num_ranks) // (num_ranks // num_nodes)
    target = max(node_bounds(load_E, slots_RS[:, :home_slots], num_nodes))
    state = _State.of(slots_RS.copy(), load_E)
    while trials and state.balance.bound - target > target // _ENOUGH:
        better = None
        for expert, rank, slot in _candidates(state, load_E, home_slots, node_R):
            if trials == 0:
                break
            trials -= 1
            tried = state.with_replica(expert, rank, slot, load_E)
            if tried.balance.bound < state.balance.bound:
                better = tried
                break
        if better is None:
            break
        state = better
    return state.slots_RS


@dataclass(frozen=True, kw_only=True)
class _State:
    """A slot table with its best split."""

    slots_RS: IntArray
    hosts_ER: BoolArray
    balance: Balance

    @classmethod
    def of(cls, slots_RS: IntArray, load_E: IntArray) -> _State:
        hosts_ER = hosts_of(slots_RS, len(load_E))
        return cls(slots_RS=slots_RS, hosts_ER=hosts_ER, balance=best_balance(hosts_ER, load_E))

    def with_replica(self, expert: int, rank: int, slot: int, load_E: IntArray) -> _State:
        slots_RS = self.slots_RS.copy()
        slots_RS[rank, slot] = expert
        return _State.of(slots_RS, load_E)


def _candidates(state: _State, load_E: IntArray, home_slots: int, node_R: IntArray) -> list[tuple[int, int, int]]:
    """Replicas to try, (expert, rank, slot): experts that cannot leave the cut, in slots outside it."""
    balance, slots_RS = state.balance, state.slots_RS
    inside_R = np.zeros(len(slots_RS), dtype=np.bool_)
    inside_R[balance.cut] = True
    # Step 1: the largest experts without a host outside.
    locked_E = (load_E > 0) & ~state.hosts_ER[:, ~inside_R].any(axis=1)
    wanted = sorted(np.nonzero(locked_E)[0].tolist(), key=lambda expert: (-int(load_E[expert]), expert))[:_EXPERTS]
    # Step 2: the spare slots on the cut's nodes that would be missed least.
    nodes = set(node_R[inside_R].tolist())
    cheap = []
    for rank in np.nonzero(~inside_R)[0].tolist():
        if int(node_R[rank]) not in nodes:
            continue
        for slot in range(home_slots, slots_RS.shape[1]):
            held = int(slots_RS[rank, slot])
            tokens = -1 if held == EMPTY else int(balance.tokens_ER[held, rank])
            cheap.append((tokens, balance.load[rank], rank, slot))
    # Step 3: every pair that is allowed.
    homes_RS = slots_RS[:, :home_slots]
    home_rank_E = np.argsort(homes_RS.ravel()) // home_slots
    return [
        (expert, rank, slot)
        for expert in wanted
        for _, _, rank, slot in sorted(cheap)[:_SLOTS]
        if node_R[home_rank_E[expert]] == node_R[rank] and not state.hosts_ER[expert, rank]
    ]
