"""Local search over the slots of one layer: take the best small change, ask the exact oracle, repeat.

In each step every small change (`moves.py`) is judged at once against the rank sets known to bind (`cuts.py`); the most
promising ones are tried on the exact oracle, and the first that really pays is kept. The search starts from the slots
as they are, so a placement that is still good costs one evaluation and nothing moves. Cheap kinds of change come
first: replicas, then exchanges of replicas, then homes where they may move.

Alternatives: random hill climbing on the same objective needs hundreds of evaluations for what the guided step finds
in ten; building from scratch (EPLB, LPT) ignores the present slots and moves nearly everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.search.cuts import MEAN_LOAD, CutPool, scaled
from megatron_smartmoe.placement.search.moves import Moves, Table, clearings, exchanges, home_swaps, replacements
from megatron_smartmoe.placement.search.objective import Objective, Space, binding, excess
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of

_JUDGED_AT_ONCE = 1 << 18  # numbers in one block of candidates x scenarios x cuts: stays in the cache
_RESOLUTION = 1e9  # steps per mean load: gains closer than one step are equal, so that rounding never decides


@dataclass(frozen=True, kw_only=True)
class ImprovedPlacement:
    """What the search found.

    Attributes:
        slots_RS: the slots after the changes.
        imbalance_K: their exact max / mean rank load in each scenario.
        excess: their value, see `objective.excess`.
        steps: changes made.
    """

    slots_RS: IntArray
    imbalance_K: FloatArray
    excess: float
    steps: int


class _View:
    """A slot table and its value under the known cuts."""

    def __init__(self, slots_RS: IntArray, loads_KE: FloatArray, pool: CutPool, objective: Objective) -> None:
        self.slots_RS, self.loads_KE, self.pool, self.objective = slots_RS, loads_KE, pool, objective
        self.hosts_ER = hosts_of(slots_RS, loads_KE.shape[1])
        self.evaluate()

    def evaluate(self) -> None:
        """Compute the excess under the cuts that are known now."""
        self.outside_EQ = self.pool.hosts_outside(self.hosts_ER)
        self.locked_KQ = self.loads_KE @ (self.outside_EQ == 0)
        self.excess = float(excess(self.locked_KQ[None], self.pool, self.objective)[0])

    def ask_oracle(self, limit: float = np.inf) -> bool:
        """Compute the exact excess, worst scenario first; False as soon as it must be above `limit`."""
        worst_first = np.argsort(-(self.locked_KQ / self.pool.size_Q).max(axis=1), kind="stable")
        for has_new_cuts in self.pool.ask_oracle(self.loads_KE[worst_first], self.hosts_ER):
            if has_new_cuts:
                self.evaluate()
            if self.excess > limit:
                return False
        return self.excess <= limit

    def wanted_E(self, max_experts: int) -> IntArray:
        """Experts locked into a binding set, the largest loads first, at most `max_experts`."""
        locked_E = (self.outside_EQ[:, binding(self.locked_KQ, self.pool)] == 0).any(axis=1)
        order = np.argsort(-self.loads_KE.max(axis=0), kind="stable")
        return np.asarray(order[locked_E[order] & (self.loads_KE.max(axis=0) > 0)[order]][:max_experts])


def improve(
    slots_RS: IntArray, loads_KE: FloatArray | IntArray, objective: Objective, space: Space, pool: CutPool | None = None
) -> ImprovedPlacement:
    """Change slots as long as a change pays.

    Args:
        slots_RS: the slots as they are; the first `space.home_slots` columns are homes.
        loads_KE: scenarios, one a row; only their proportions matter.
        objective: what a slot table is worth.
        space: what may be changed.
        pool: known cuts, shared between calls to save time; with None the search starts without any.
    """
    pool = pool or CutPool(slots_RS.shape[0])
    loads_KE = scaled(loads_KE, pool.num_ranks)
    start_ER = hosts_of(slots_RS, loads_KE.shape[1])
    # Step 1: the exact value of the slots as they are.
    view = _View(slots_RS.copy(), loads_KE, pool, objective)
    view.ask_oracle()
    # Step 2: make the best change that the oracle confirms, until there is none.
    for steps in range(space.max_steps + 1):
        better = _step(view, start_ER, space) if steps < space.max_steps else None
        if better is None:
            break
        view = better
    # Step 3: the largest rank load of each scenario, from the cuts that bind it.
    view.evaluate()
    imbalance_K = np.maximum((view.locked_KQ / pool.size_Q).max(axis=1) / MEAN_LOAD, 1.0)
    return ImprovedPlacement(slots_RS=view.slots_RS, imbalance_K=imbalance_K, excess=view.excess, steps=steps)


def _step(view: _View, start_ER: BoolArray, space: Space) -> _View | None:
    """The best change that the oracle confirms, or None."""
    view.evaluate()
    for moves in _kinds(view, start_ER, space):
        if not len(moves):
            continue
        view.evaluate()  # earlier trials may have added cuts to the pool
        gain_M = view.excess - _judge(moves, view) - moves.price_M
        for at in np.argsort(-np.rint(gain_M * _RESOLUTION), kind="stable")[: space.trials]:
            if gain_M[at] <= view.objective.min_gain:
                break
            trial = _View(moves.applied(int(at), view.slots_RS), view.loads_KE, view.pool, view.objective)
            if trial.ask_oracle(limit=view.excess - moves.price_M[at] - view.objective.min_gain):
                return trial
    return None


def _kinds(view: _View, start_ER: BoolArray, space: Space) -> Iterator[Moves]:
    """The kinds of change in the order in which they are tried."""
    slots_RS, objective = view.slots_RS, view.objective
    table = Table(slots_RS=slots_RS, hosts_ER=view.hosts_ER, start_ER=start_ER, space=space, objective=objective)
    needed = view.excess > objective.enough
    wanted_E = view.wanted_E(space.max_experts) if needed else np.empty(0, dtype=np.int64)
    if slots_RS.shape[1] > space.home_slots and (needed or objective.replica_price > 0):
        clear = clearings(table)
        missed_M = _judge(clear, view) + clear.price_M
        if needed:
            cheap_S = np.sort(np.argsort(np.rint(missed_M * _RESOLUTION), kind="stable")[: space.max_slots])
            yield replacements(table, wanted_E, cheap_S)
            yield exchanges(table, wanted_E, cheap_S)
        if objective.replica_price > 0:
            yield clear
    if needed and space.move_homes:
        yield home_swaps(table, wanted_E)


def _judge(moves: Moves, view: _View) -> FloatArray:
    """The excess after each move under the known cuts, a lower bound of the exact one, `[M]`."""
    inside_all_Q = np.zeros((1, len(view.pool.size_Q)), dtype=np.bool_)  # row NOWHERE: outside of no set
    outside_RQ = np.concatenate([view.pool.outside_RQ, inside_all_Q]).astype(np.float64)
    locked_EQ = (view.outside_EQ == 0).astype(np.float64)
    at_once = max(1, _JUDGED_AT_ONCE // view.locked_KQ.size)
    value_M = np.empty(len(moves))
    for begin in range(0, len(moves), at_once):
        part = slice(begin, begin + at_once)
        locked_MKQ = view.locked_KQ[None].repeat(len(value_M[part]), axis=0)
        for column in range(2):
            expert_M, from_M, to_M = (x[part, column] for x in (moves.expert_M2, moves.from_M2, moves.to_M2))
            # An expert's load is locked into Q when the move leaves it no host outside.
            hosts_MQ = view.outside_EQ[expert_M] - outside_RQ[from_M] + outside_RQ[to_M]
            change_MQ = np.where((expert_M != EMPTY)[:, None], (hosts_MQ == 0) - locked_EQ[expert_M], 0.0)
            locked_MKQ += view.loads_KE[:, expert_M].T[:, :, None] * change_MQ[:, None]
        value_M[part] = excess(locked_MKQ, view.pool, view.objective)
    return value_M
