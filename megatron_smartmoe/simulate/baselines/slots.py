"""What the rules share: putting homes and replicas into slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerProblem
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray


def home_slots_of(home_rank_E: IntArray, num_ranks: int) -> list[list[int]]:
    """Experts of each rank, in order of expert."""
    return [np.nonzero(home_rank_E == rank)[0].tolist() for rank in range(num_ranks)]


def fill_slots(experts_of_rank: Sequence[Sequence[int]], num_slots: int) -> IntArray:
    """`[R, S]` from each rank's experts, EMPTY after the last; wider than `num_slots` if a rank needs it."""
    width = max([num_slots, *(len(experts) for experts in experts_of_rank)])
    slots_RS = np.full((len(experts_of_rank), width), EMPTY, dtype=np.int64)
    for rank, experts in enumerate(experts_of_rank):
        slots_RS[rank, : len(experts)] = experts
    return slots_RS


def add_replicas(problem: LayerProblem, replica_ER: BoolArray) -> IntArray:
    """The problem's homes where they are, and behind them each rank's replicas in order of expert."""
    home_RH = problem.slots_RS[:, : problem.home_slots]
    experts = [[*home_RH[r].tolist(), *np.nonzero(replica_ER[:, r])[0].tolist()] for r in range(problem.num_ranks)]
    return fill_slots(experts, problem.home_slots + problem.spare_slots)
