"""EPIC: replicas by load once, then at most one swap for each pair of ranks in every step.

Method, at first. The redundant slots are given out one by one, each to the expert with the most tokens per instance, at
most one instance a rank. Instances, the largest first, go to the least loaded rank with a free slot and without that
expert. On several nodes the ranks' contents, the most loaded first, then go to the node where the largest traffic of a
rank with other nodes stays smallest.

In every step after that. Inside a node, ranks are sorted by load, and the most loaded is paired with the least loaded,
the second with the last but one, and so on. In each pair the two slots are swapped whose swap lowers the pair's larger
load the most, if it saves at least `min_gain_tokens`; no rank may hold an expert twice. It starts from the placement of
the step before, so few experts move. An expert's tokens are shared equally by its instances.

Source: EPIC (SIGCOMM 2026, doi 10.1145/3789240.3829201). Its paper could not be read: this follows a summary
(AI-Infra-Team/awesome-papers) and a port (epic_semantics.py), ties to the lower rank and slot. A swap pays when its
gain is at least the time of the swap over that of a token; neither constant is public, so here any gain pays. It is
made for inference; in training an expert's state moves with it, which is charged as a move of a home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY


@dataclass(frozen=True, kw_only=True)
class Epic:
    """Swaps between paired ranks.

    Attributes:
        min_gain_tokens: tokens that a swap must take off the pair's larger load.
    """

    name: str = "epic"
    sees: Sees = "history"
    min_gain_tokens: float = 1.0

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """A first placement while slots are empty, swaps from then on."""
        num_slots = problem.home_slots + problem.spare_slots
        slots_RS = problem.slots_RS[:, :num_slots]
        if (slots_RS == EMPTY).any():
            slots_RS = _first_placement(problem)
        else:
            slots_RS = self._swapped(slots_RS, problem)
        return LayerPlan(slots_RS=slots_RS, split="equal")

    def _swapped(self, slots_RS: IntArray, problem: LayerProblem) -> IntArray:
        """One swap at most for each pair of each node."""
        slots_RS = slots_RS.copy()
        share_E = problem.load_E / np.bincount(slots_RS.ravel(), minlength=problem.num_experts)
        load_R = share_E[slots_RS].sum(axis=1)
        per_node = problem.num_ranks // problem.num_nodes
        for first in range(0, problem.num_ranks, per_node):
            order = first + np.argsort(-load_R[first : first + per_node], kind="stable")
            for high, low in zip(order[: per_node // 2], order[::-1], strict=False):
                self._swap(slots_RS, share_E, int(high), int(low))
        return slots_RS

    def _swap(self, slots_RS: IntArray, share_E: FloatArray, high: int, low: int) -> None:
        """Swap the two slots that lower the larger load of two ranks the most; `slots_RS` changes."""
        share_S, other_S = share_E[slots_RS[high]], share_E[slots_RS[low]]
        moved_SS = share_S[:, None] - other_S[None, :]
        larger_SS = np.maximum(share_S.sum() - moved_SS, other_S.sum() + moved_SS)
        is_double_SS = np.isin(slots_RS[high], slots_RS[low])[:, None] | np.isin(slots_RS[low], slots_RS[high])[None, :]
        larger_SS = np.where(is_double_SS, np.inf, larger_SS)
        one, other = np.unravel_index(int(np.argmin(larger_SS)), larger_SS.shape)
        if max(share_S.sum(), other_S.sum()) - larger_SS[one, other] >= self.min_gain_tokens:
            slots_RS[high, one], slots_RS[low, other] = slots_RS[low, other], slots_RS[high, one]


def _first_placement(problem: LayerProblem) -> IntArray:
    """All slots filled, as far as no rank would hold an expert twice."""
    num_ranks, num_slots, load_E = problem.num_ranks, problem.home_slots + problem.spare_slots, problem.load_E
    # Step 1: how many instances each expert has.
    instances_E = np.ones(problem.num_experts, dtype=np.int64)
    for _ in range(num_ranks * problem.spare_slots):
        expert = int(np.argmax(np.where(instances_E < num_ranks, load_E / instances_E, -1.0)))
        instances_E[expert] += instances_E[expert] < num_ranks
    # Step 2: instances to ranks. A rank that could take none of what is left keeps its slot empty.
    slots_RS = np.full((num_ranks, num_slots), EMPTY, dtype=np.int64)
    load_R, used_R = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    for expert in np.argsort(-load_E / instances_E, kind="stable"):
        for _ in range(int(instances_E[expert])):
            may_R = (used_R < num_slots) & ~(slots_RS == expert).any(axis=1)
            if not may_R.any():
                break
            rank = int(np.argmin(np.where(may_R, load_R, np.inf)))
            slots_RS[rank, used_R[rank]] = expert
            used_R[rank] += 1
            load_R[rank] += load_E[expert] / instances_E[expert]
    return slots_RS[_ranks_by_node(load_R, problem.num_nodes)]


def _ranks_by_node(load_R: FloatArray, num_nodes: int) -> IntArray:
    """The contents of which rank each rank gets, so that the largest traffic of a rank with other nodes is small."""
    num_ranks, total = len(load_R), max(float(load_R.sum()), 1e-300)
    per_node = num_ranks // num_nodes
    nodes: list[list[int]] = [[] for _ in range(num_nodes)]

    def largest(node: int, rank: int) -> float:
        """A rank receives from the other nodes' sources, and sends what its own node does not compute."""
        tried = [[*ranks, rank] if at == node else ranks for at, ranks in enumerate(nodes)]
        receives = load_R * (num_ranks - per_node) / num_ranks
        return max(
            float(receives[one]) + total / num_ranks * (1 - float(load_R[ranks].sum()) / total)
            for ranks in tried
            for one in ranks
        )

    for rank in np.argsort(-load_R, kind="stable").tolist():
        free = [node for node in range(num_nodes) if len(nodes[node]) < per_node]
        nodes[min(free, key=lambda node: (largest(node, rank), node))].append(rank)
    return np.array([rank for ranks in nodes for rank in ranks])
