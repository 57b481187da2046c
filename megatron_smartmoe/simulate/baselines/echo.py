"""ECHO: elastic cloning of hot experts into spare slots by bin packing of their spillover.

Method. A rank above the mean spills what is over it: its experts are stacked in order of rising load, and what of each
expert lies above the mean is that expert's spillover, so the hottest spills first. Ranks below the mean have room for
their distance to it. Ranks in order of falling room each take the expert with the most spillover left, as much as fits,
into their spare slot; what is left of it may go on to the next rank. A spare slot serves one expert; what finds no slot
stays at home. With more spare slots the ranks are gone through once per slot.

Source: NVIDIA/Megatron-LM pull request 2368, "MoE ECHO: Elastic Cloning for Hot Experts" (2025, draft), approximate bin
packing. The original sorts the spillovers into eight buckets to avoid a full sort on the GPU; here they are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of


@dataclass(frozen=True, kw_only=True)
class Echo:
    """Bin packing of spillover, homes fixed."""

    name: str = "echo"
    sees: Sees = "exact"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Clone from ranks above the mean to ranks below it."""
        home_E, load_E = problem.home_rank_E, problem.load_E
        host_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        replica_ER = np.zeros_like(host_ER)
        quota_ER = np.where(host_ER, load_E[:, None], 0)
        mean = int(load_E.sum()) // problem.num_ranks
        # Step 1: what each expert spills above the mean, and the room below it on each rank.
        spill_E = spillover(load_E, home_E, problem.num_ranks, mean)
        room_R = np.maximum(mean - quota_ER.sum(axis=0), 0)
        # Step 2: one round per spare slot; the ranks with the most room take the largest spillovers.
        for _ in range(problem.spare_slots):
            for rank in np.argsort(-room_R, kind="stable"):
                candidate_E = np.where(host_ER[:, rank] | replica_ER[:, rank], 0, spill_E)
                expert = int(np.argmax(candidate_E))
                take = min(int(candidate_E[expert]), int(room_R[rank]))
                if take <= 0:
                    continue
                replica_ER[expert, rank] = True
                quota_ER[expert, rank] += take
                quota_ER[expert, home_E[expert]] -= take
                spill_E[expert] -= take
                room_R[rank] -= take
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="quota", quota_ER=quota_ER)


def spillover(load_E: IntArray, home_E: IntArray, num_ranks: int, mean: int) -> IntArray:
    """Tokens of each expert above the mean when its rank's experts are stacked in order of rising load."""
    spill_E = np.zeros_like(load_E)
    for rank in range(num_ranks):
        experts = np.nonzero(home_E == rank)[0]
        experts = experts[np.argsort(load_E[experts], kind="stable")]
        above = np.maximum(np.cumsum(load_E[experts]) - mean, 0)
        spill_E[experts] = np.diff(above, prepend=0)
    return spill_E
