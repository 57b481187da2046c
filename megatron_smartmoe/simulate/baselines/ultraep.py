"""UltraEP's quota planner: replication and rerouting solved together under a bisected threshold.

Method. A threshold on the tokens of a rank is searched between the mean and the largest rank load. For one threshold:
ranks above it, most loaded first, give away their excess; of each, experts in order of falling load; each time to the
rank with the most room that has a free spare slot and does not hold the expert. What a rank takes is its quota: the
smallest of what is to go, what fits and what the expert has. A threshold is feasible when no excess is left. Homes
never move and spare slots start empty, so a plan is what the binary search last found feasible, within `tolerance` of
the mean.

Source: "UltraEP" (arXiv 2606.04101), quota-driven balancing; csrc/kernels/placement.cu of github.com/Dots-Infra/UltraEP
(MIT), here for one NVLink domain, whatever the number of nodes. Default tolerance 1%; the release sends a replica 1024
tokens at least, here 1, which favours its balance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of


@dataclass(frozen=True, kw_only=True)
class UltraEp:
    """Quota planner.

    Attributes:
        tolerance: width of the last search interval, as a share of the mean rank load.
        min_tokens_per_replica: a smaller quota is not worth a replica.
    """

    name: str = "ultraep"
    sees: Sees = "exact"
    tolerance: float = 0.01
    min_tokens_per_replica: int = 1

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Bisect the threshold; the plan of the smallest that was feasible."""
        num_experts, num_ranks = problem.num_experts, problem.num_ranks
        home_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], num_experts)
        best_ER = np.where(home_ER, problem.load_E[:, None], 0)
        # The search interval: from the mean, rounded up, to the largest load without replicas.
        high = int(best_ER.sum(axis=0).max())
        low = -(-int(problem.load_E.sum()) // num_ranks)
        step = max(1, int(self.tolerance * low))
        found_ER = self.quotas(problem, low)
        while found_ER is None and high - low > step:
            middle = (low + high) // 2
            tried_ER = self.quotas(problem, middle)
            if tried_ER is None:
                low = middle
            else:
                best_ER, high = tried_ER, middle
        quota_ER = best_ER if found_ER is None else found_ER
        replica_ER = (quota_ER > 0) & ~home_ER
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="quota", quota_ER=quota_ER)

    def quotas(self, problem: LayerProblem, threshold: int) -> IntArray | None:
        """Tokens of expert e on rank r, `[E, R]`, none above the threshold; None if the greedy finds none."""
        load_E, home_E = problem.load_E, problem.home_rank_E
        hosts_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        quota_ER = np.where(hosts_ER, load_E[:, None], 0)
        load_R = quota_ER.sum(axis=0)
        room_R = np.maximum(threshold - load_R, 0)
        free_R = np.full(problem.num_ranks, problem.spare_slots)
        for source in np.argsort(-load_R, kind="stable"):
            excess = int(load_R[source]) - threshold
            experts = np.nonzero(home_E == source)[0]
            for expert in experts[np.argsort(-load_E[experts], kind="stable")]:
                while excess > 0:
                    open_R = np.where((free_R > 0) & ~hosts_ER[expert], room_R, 0)
                    target = int(np.argmax(open_R))
                    take = min(excess, int(open_R[target]), int(quota_ER[expert, source]))
                    if take < self.min_tokens_per_replica:
                        break
                    quota_ER[expert, source] -= take
                    quota_ER[expert, target] += take
                    hosts_ER[expert, target] = True
                    room_R[target] -= take
                    free_R[target] -= 1
                    excess -= take
            if excess > 0:
                return None
        return quota_ER
