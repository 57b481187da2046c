"""Longest first with a cap on the number of experts per rank: plain, and as SmartMoE (2023) uses it.

Method. Experts in order of falling load; each goes to the least loaded rank that still has a free slot (Graham's LPT,
1969, with a cardinality constraint). Homes only, no replicas: spare slots stay empty.

`Lpt` starts from nothing, every time; it is also what MindSpeed, EPLB without redundant experts, TensorRT-LLM and LAER
come to. `SmartMoE2023` is the published greedy: it starts from the placement in force (contiguous at first), prefers an
expert's present rank among equally loaded ones (else the lowest), and keeps the old placement unless the new one has a
strictly smaller largest load. Nothing in it prices the move. Source: Zhai et al., "SmartMoE", USENIX ATC 2023, section
5; thu-pacman/SmartMoE-AE, fmoe/smartmoe/mapping.py, "Greedy" (described in its artifact; GPL-3.0, no line taken).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import fill_slots, home_slots_of
from megatron_smartmoe.spec.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class Lpt:
    """Longest first from scratch."""

    name: str = "lpt"
    sees: Sees = "history"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Place every expert anew."""
        return _homes_plan(problem, longest_first(problem.load_E, problem.num_ranks))


@dataclass(frozen=True, kw_only=True)
class SmartMoE2023:
    """Longest first, accepted if the largest rank load falls."""

    name: str = "smartmoe2023"
    sees: Sees = "history"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Keep the homes or replace all of them."""
        before_E = problem.home_rank_E
        after_E = longest_first(problem.load_E, problem.num_ranks, prefer_rank_E=before_E)
        if _largest_load(problem, after_E) < _largest_load(problem, before_E):
            return _homes_plan(problem, after_E)
        home_RH = problem.slots_RS[:, : problem.home_slots]
        slots_RS = fill_slots(home_RH.tolist(), problem.home_slots + problem.spare_slots)
        return LayerPlan(slots_RS=slots_RS, split="equal")


def longest_first(load_E: IntArray, num_ranks: int, prefer_rank_E: IntArray | None = None) -> IntArray:
    """Rank of each expert, E / R experts per rank.

    Args:
        load_E: tokens of each expert; equal loads are placed in order of expert.
        num_ranks: R.
        prefer_rank_E: rank that wins a tie for the least loaded; without it, or if it is not among them, the lowest.
    """
    free_R = np.full(num_ranks, len(load_E) // num_ranks)
    tokens_R = np.zeros(num_ranks, dtype=np.int64)
    rank_E = np.zeros(len(load_E), dtype=np.int64)
    for expert in np.argsort(-load_E, kind="stable"):
        open_R = np.where(free_R > 0, tokens_R, np.iinfo(np.int64).max)
        rank = int(np.argmin(open_R))
        if prefer_rank_E is not None and open_R[prefer_rank_E[expert]] == open_R[rank]:
            rank = int(prefer_rank_E[expert])
        rank_E[expert] = rank
        tokens_R[rank] += load_E[expert]
        free_R[rank] -= 1
    return rank_E


def _largest_load(problem: LayerProblem, home_rank_E: IntArray) -> int:
    return int(np.bincount(home_rank_E, weights=problem.load_E, minlength=problem.num_ranks).max())


def _homes_plan(problem: LayerProblem, home_rank_E: IntArray) -> LayerPlan:
    experts_of_rank = home_slots_of(home_rank_E, problem.num_ranks)
    return LayerPlan(slots_RS=fill_slots(experts_of_rank, problem.home_slots + problem.spare_slots), split="equal")
