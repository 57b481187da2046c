"""DeepSeek EPLB: replicas of the experts with the largest load per replica, then longest-first packing; equal split.

Method, global: the R * K redundant slots are given out one by one, each to the expert whose load per replica is
largest; then all replicas, longest first, go to the least loaded rank with a free slot. Hierarchical: experts come in
groups that routing keeps together; groups are packed onto nodes first, replicas are given out and packed inside each
node, so that none leaves its group's node. It applies when the groups divide evenly among the nodes, else the global
rule does.

In this file a replica is as in EPLB: every instance of an expert, the first one included. A rank may get two replicas
of one expert; its tokens are shared equally by all of them. Homes move with every plan.
Source: DeepSeek-V3 technical report (2412.19437) section 3.4; github.com/deepseek-ai/EPLB, README and eplb.py (MIT).
Default: the eight groups of DeepSeek-V3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import fill_slots
from megatron_smartmoe.spec.arrays import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Eplb:
    """Global replication and packing."""

    name: str = "eplb"
    sees: Sees = "history"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Treat all ranks alike."""
        experts_E = np.arange(problem.num_experts)
        return _plan(problem, _replicate_and_pack(experts_E, problem.load_E, problem.num_ranks, problem.spare_slots))


@dataclass(frozen=True, kw_only=True)
class EplbHierarchical:
    """Groups to nodes, then replicas inside nodes.

    Attributes:
        num_groups: expert groups of the routing, E / num_groups consecutive experts each.
    """

    name: str = "eplb-hierarchical"
    sees: Sees = "history"
    num_groups: int = 8

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Node by node where the groups allow it."""
        num_nodes, num_experts = problem.num_nodes, problem.num_experts
        if self.num_groups % num_nodes or num_experts % self.num_groups:
            return Eplb().plan(problem)
        group_size = num_experts // self.num_groups
        load_G = problem.load_E.reshape(self.num_groups, group_size).sum(axis=1).astype(np.float64)
        experts_of_rank: list[list[int]] = []
        # Step 1: pack the groups onto the nodes. Step 2: inside each node, as the global rule does.
        for groups in pack_evenly(load_G, num_nodes):
            experts = np.concatenate([np.arange(g * group_size, (g + 1) * group_size) for g in groups])
            ranks = problem.num_ranks // num_nodes
            experts_of_rank += _replicate_and_pack(experts, problem.load_E, ranks, problem.spare_slots)
        return _plan(problem, experts_of_rank)


def replicas_by_load(load_E: IntArray, num_extra: int) -> IntArray:
    """How many replicas each expert gets: one, and `num_extra` more where the load per replica is largest."""
    replicas_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(num_extra):
        replicas_E[np.argmax(load_E / replicas_E)] += 1
    return replicas_E


def pack_evenly(load_N: FloatArray, num_packs: int) -> list[list[int]]:
    """Longest first into packs of the same number of items; one item per pack stays in order, as in the original."""
    per_pack = len(load_N) // num_packs
    if per_pack == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    load_P = np.zeros(num_packs)
    for item in np.argsort(-load_N, kind="stable"):
        open_P = [np.inf if len(packs[p]) == per_pack else load_P[p] for p in range(num_packs)]
        pack = int(np.argmin(open_P))
        packs[pack].append(int(item))
        load_P[pack] += load_N[item]
    return packs


def _replicate_and_pack(experts_M: IntArray, load_E: IntArray, num_ranks: int, spare_slots: int) -> list[list[int]]:
    """Experts of each of `num_ranks` ranks that host `experts_M`, with `spare_slots` more replicas on each."""
    # Step 1: give out the redundant slots.
    replicas_M = replicas_by_load(load_E[experts_M], num_ranks * spare_slots)
    expert_C = np.repeat(experts_M, replicas_M)
    load_C = np.repeat(load_E[experts_M] / replicas_M, replicas_M)
    # Step 2: pack all replicas onto the ranks.
    return [expert_C[pack].tolist() for pack in pack_evenly(load_C, num_ranks)]


def _plan(problem: LayerProblem, experts_of_rank: list[list[int]]) -> LayerPlan:
    num_slots = problem.home_slots + problem.spare_slots
    return LayerPlan(slots_RS=fill_slots(experts_of_rank, num_slots), split="equal")
