"""UltraEP's quota planner: replication and rerouting solved together under a bisected threshold.

Method. A threshold on the tokens of a rank is searched between the mean and the largest rank load. For one threshold:
ranks above it, most loaded first, give away their excess; of each, experts in order of falling load; each time to the
rank with the most room that has a free spare slot and does not hold the expert. What a rank takes is its quota: the
smallest of what is to go, what fits and what the expert has. A threshold is feasible when no excess is left. Homes
never move and spare slots start empty, so a plan is what the binary search last found feasible, within `tolerance` of
the mean.

Replicas stay in the NVLink domain: each node is balanced for itself, on its own mean. A quota below
`min_tokens_per_replica` is not given, which can leave a threshold infeasible that smaller quotas would reach.

Relay. An expert with several replicas is not sent by its home alone: of n replicas about the square root of n become
relays, which forward it to the others. Experts go in order of their homes; the relays are the replicas on the ranks
that send the least so far, and each further replica goes to the relay that will have sent the least. Domains of up to 8
ranks, experts with fewer than 4 replicas, and trees that would not save 2 sends are sent directly. Gradients return
directly in any case.

Source: "UltraEP" (arXiv 2606.04101), quota-driven balancing; csrc/kernels/placement.cu and weight_sync.cu of
github.com/Dots-Infra/UltraEP v1.0.0 (MIT), and the defaults in its README: tolerance 1%, 1024 tokens a replica. The
rule `ultraep-min1` gives quotas of any size, which favours its balance. Not modelled: it sends weights again in the
backward pass, and hides the gradients' return; both are priced here as ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_cost import direct_replicas
from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray, hosts_of


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
    min_tokens_per_replica: int = 1024

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Bisect each node's threshold; the plan of the smallest that was feasible."""
        home_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        quota_ER = np.where(home_ER, problem.load_E[:, None], 0)
        per_node = problem.num_ranks // problem.num_nodes
        for first in range(0, problem.num_ranks, per_node):
            quota_ER = self._node_quotas(problem, quota_ER, range(first, first + per_node))
        replica_ER = (quota_ER > 0) & ~home_ER
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="quota", quota_ER=quota_ER)

    def _node_quotas(self, problem: LayerProblem, quota_ER: IntArray, ranks: range) -> IntArray:
        """The quotas after the ranks of one node have been balanced."""
        load_R = quota_ER.sum(axis=0)[ranks.start : ranks.stop]
        # The search interval: from the mean, rounded up, to the largest load without replicas.
        best_ER, high = quota_ER, int(load_R.max())
        low = -(-int(load_R.sum()) // len(ranks))
        step = max(1, int(self.tolerance * low))
        found_ER = self.quotas(problem, quota_ER, ranks, low)
        while found_ER is None and high - low > step:
            middle = (low + high) // 2
            tried_ER = self.quotas(problem, quota_ER, ranks, middle)
            if tried_ER is None:
                low = middle
            else:
                best_ER, high = tried_ER, middle
        return best_ER if found_ER is None else found_ER

    def quotas(self, problem: LayerProblem, before_ER: IntArray, ranks: range, threshold: int) -> IntArray | None:
        """Tokens of expert e on rank r, `[E, R]`, none of `ranks` above the threshold; None where none are found."""
        load_E, home_E = problem.load_E, problem.home_rank_E
        hosts_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        quota_ER = before_ER.copy()
        load_R = quota_ER.sum(axis=0)
        room_R = np.where(_within(ranks, problem.num_ranks), np.maximum(threshold - load_R, 0), 0)
        free_R = np.full(problem.num_ranks, problem.spare_slots)
        for source in [rank for rank in np.argsort(-load_R, kind="stable").tolist() if rank in ranks]:
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


def _within(ranks: range, num_ranks: int) -> BoolArray:
    return np.isin(np.arange(num_ranks), ranks)


DIRECT_UP_TO_RANKS = 8  # of an NVLink domain
MIN_REPLICAS, MAX_RELAYS, MIN_FANOUT_GAIN = 4, 8, 2


def ultraep_relay(home_E: IntArray, hosts_ER: BoolArray, num_nodes: int = 1) -> tuple[FloatArray, FloatArray]:
    """Replicas' weights that rank r sends to rank q, and the way that their gradients take back, `[R, R]` each.

    Args:
        home_E: home rank of each expert.
        hosts_ER: the ranks that hold each expert, its home among them.
        num_nodes: NVLink domains.
    """
    num_ranks = hosts_ER.shape[1]
    sends_RR = np.zeros((num_ranks, num_ranks))
    is_direct = num_ranks // num_nodes <= DIRECT_UP_TO_RANKS
    for expert in np.argsort(home_E, kind="stable").tolist():
        home = int(home_E[expert])
        targets = [rank for rank in np.nonzero(hosts_ER[expert])[0].tolist() if rank != home]
        relays = [] if is_direct else _relays(targets, sends_RR.sum(axis=1))
        for rank in relays or targets:
            sends_RR[home, rank] += 1
        if relays:
            _forward(sends_RR, relays, [rank for rank in targets if rank not in relays])
    return sends_RR, direct_replicas(hosts_ER, home_E)


def _relays(targets: list[int], sent_R: FloatArray) -> list[int]:
    """The replicas that forward: those whose ranks have sent the least; none where that does not shorten the way."""
    count = min(math.isqrt(len(targets)), MAX_RELAYS)
    if len(targets) < MIN_REPLICAS:
        return []
    longest = max(count, -(-(len(targets) - count) // count))
    if len(targets) - longest < MIN_FANOUT_GAIN:
        return []
    return sorted(targets, key=lambda rank: (sent_R[rank], rank))[:count]


def _forward(sends_RR: FloatArray, relays: list[int], others: list[int]) -> None:
    """Give every relay one of the others, the rest to the relay that has sent the least."""
    children = dict.fromkeys(relays, 0)
    for at, rank in enumerate(others):
        least = min(relays, key=lambda relay: (sends_RR[relay].sum(), children[relay], relay))
        relay = relays[at] if at < len(relays) else least
        sends_RR[relay, rank] += 1
        children[relay] += 1
