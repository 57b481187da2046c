"""LPLB: each rank's hottest experts have one more place each, on a fixed neighbour, and a linear program shares tokens.

Method. A topology names for every rank and spare slot one other rank, which holds a replica there; each of its columns
is a permutation, so that every rank gives and takes one replica per column. A rank's hottest home experts, as many as
there are columns, are replicated, the hottest along the first. Every micro-batch then solves: minimise t, with x_jd in
[0, w_jd] tokens of the d-th replicated expert of rank j moved along its edge and every rank's load at most t.

The cube of eight ranks is the published one, two columns within two squares of four and one across. Other powers of two
have a hypercube's edges, other numbers of ranks a ring's; with more columns than the topology has, slots stay empty.

Source: github.com/deepseek-ai/LPLB (README; the linear program is written from its bounds). There the homes are
reordered by EPLB now and then, and the hottest experts are those of the history; here homes stay, and the rule sees the
counts that it plans for, which favours it. The program is solved exactly, in whole tokens (`split.min_max_split`: with
these hosts it is the same program), where LPLB takes a fixed number of interior-point steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import fill_slots
from megatron_smartmoe.spec.arrays import IntArray

CUBE = np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]])


@dataclass(frozen=True, kw_only=True)
class Lplb:
    """Replicas along a fixed topology."""

    name: str = "lplb"
    sees: Sees = "exact"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Replicas of each rank's hottest experts on its neighbours."""
        homes_RH = problem.slots_RS[:, : problem.home_slots]
        experts = homes_RH.tolist()
        hottest_RH = np.take_along_axis(homes_RH, np.argsort(-problem.load_E[homes_RH], axis=1, kind="stable"), axis=1)
        columns_DR = topology(problem.num_ranks)[: min(problem.spare_slots, problem.home_slots)]
        for column, holder_R in enumerate(columns_DR):
            for rank, holder in enumerate(holder_R.tolist()):
                expert = int(hottest_RH[rank, column])
                if problem.load_E[expert]:
                    experts[holder].append(expert)
        slots_RS = fill_slots(experts, problem.home_slots + problem.spare_slots)
        return LayerPlan(slots_RS=slots_RS, split="exact")


def topology(num_ranks: int) -> IntArray:
    """The rank that holds a replica of rank r's d-th hottest expert, `[D, R]`; all ranks of a column differ."""
    if num_ranks == CUBE.shape[1]:
        return CUBE
    ranks = np.arange(num_ranks)
    if num_ranks & (num_ranks - 1):
        return (ranks + 1)[None, :] % num_ranks
    dimensions = num_ranks.bit_length() - 1
    return np.array([ranks ^ (1 << at) for at in range(dimensions)]).reshape(dimensions, num_ranks)
