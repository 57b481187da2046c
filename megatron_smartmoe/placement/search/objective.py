"""What a slot table is worth, and what a search may change: the terms that all planners share.

The makespan alone is a poor guide: with two equal bottlenecks no single change lowers the maximum. So the overflow, the
tokens above the mean load that no split can place, is added with a small weight; it falls with every useful replica.
Averaging over scenarios and adding the worst keeps a plan from being perfect for the last record only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.search.cuts import MEAN_LOAD, CutPool
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray

OVERFLOW_WEIGHT = 0.1  # of the overflow (in mean rank loads) beside the makespan; 0.05 to 0.3 do equally well


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a slot table is worth, in units of the mean rank load (lower is better).

    Attributes:
        worst_weight: weight of the worst scenario beside the mean over all of them.
        replica_price: price of a replica in an iteration: its weights out and its gradients back.
        change_price: price of a slot that is filled with an expert which its rank did not hold at the start.
        home_price: price of an expert whose home moves: weights, main weights and moments, over the plan's horizon.
        min_gain: what a change must gain above its price.
        enough: an excess (see `excess`) below which the search stops.
    """

    worst_weight: float = 0.3
    replica_price: float = 0.0
    change_price: float = 0.0
    home_price: float = 0.0
    min_gain: float = 1e-4
    enough: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search may change.

    Attributes:
        home_slots: columns of homes, E / R.
        node_R: node of each rank; a replica lies on its home's node. All zero when replicas may lie anywhere.
        move_homes: whether homes may be swapped (within a node).
        max_steps: most changes.
        max_experts: experts considered for a replica in one step, those with the largest loads; bounds a step's time.
        max_slots: slots considered for it, those whose replicas matter least.
        trials: candidates of one kind and step that are tried on the exact oracle.
    """

    home_slots: int
    node_R: IntArray
    move_homes: bool = False
    max_steps: int = 200
    max_experts: int = 24
    max_slots: int = 24
    trials: int = 4

    def allowed_ER(self, slots_RS: IntArray) -> BoolArray:
        """Whether rank r may hold a replica of expert e."""
        home_RH = slots_RS[:, : self.home_slots]
        home_node_E = np.empty(home_RH.size, dtype=np.int64)
        home_node_E[home_RH] = self.node_R[:, None]
        return np.asarray(home_node_E[:, None] == self.node_R)


def excess(locked_MKQ: FloatArray, pool: CutPool, objective: Objective) -> FloatArray:
    """Makespan and overflow above the mean load, mean over scenarios and `worst_weight` times the worst, `[M]`.

    Args:
        locked_MKQ: load that cannot leave set Q in scenario K, for each of M slot tables.
        pool: the sets.
        objective: the weights.
    """
    overflow_MKQ = locked_MKQ - pool.size_Q * MEAN_LOAD
    overflow_MK = np.maximum(overflow_MKQ.max(axis=2), 0.0)
    makespan_MK = np.maximum((overflow_MKQ / pool.size_Q).max(axis=2), 0.0)
    value_MK = (makespan_MK + OVERFLOW_WEIGHT * overflow_MK) / MEAN_LOAD
    # The mean is added up in the order of the scenarios, as in C++; numpy's own order depends on their number.
    total_M = np.zeros(len(value_MK))
    for value_M in value_MK.T:
        total_M += value_M
    return np.asarray(total_M / value_MK.shape[1] + objective.worst_weight * value_MK.max(axis=1))


def binding(locked_KQ: FloatArray, pool: CutPool) -> IntArray:
    """Indices of the sets that decide the makespan or the overflow of a scenario."""
    overflow_KQ = locked_KQ - pool.size_Q * MEAN_LOAD
    hurt_KQ = overflow_KQ[overflow_KQ.max(axis=1) > 0]
    return np.unique(np.concatenate([hurt_KQ.argmax(axis=1), (hurt_KQ / pool.size_Q).argmax(axis=1)]))
