"""LAER-MoE: any layout of experts every iteration, chosen by a cost among a few replications; parameters are sharded.

Method. Candidates are numbers of replicas: the same of every expert where the slots divide evenly; by load, one at a
time to the expert with the most tokens per replica (from as many replicas as there are nodes on, a whole set of one per
node); and two random changes of each, a replica moved from one expert to another. A candidate is placed replica by
replica, the largest share first, on a rank with a free slot: on the nodes that have the fewest replicas of the expert,
there on the least loaded rank. A source's tokens are shared evenly by the replicas on its node, or by all where that
has none. The candidate with the smallest cost wins: four all-to-alls at the sum of the ranks' sending times, and three
passes of the busiest rank's computation.

Experts are fully sharded over all ranks (FSEP): no rank owns one, so nothing migrates; instead every rank gathers the
weights of all of its slots, and scatters their gradients (`laer_traffic`).

Source: "LAER-MoE" (arXiv 2602.11686); csrc/greedy_balancer.cpp of github.com/PKU-DAIR/Hetu-Galvatron, branch laer-moe
(Apache-2.0), with the constants of its A100 cluster. It plans from a window of five iterations; here from the last
record. Evaluated with equal shares over all replicas, also where ranks are on several nodes, and charged for one gather
of the weights an iteration, which favours it where memory does not hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import fill_slots
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray

ALL_TO_ALLS, PASSES = 4, 3
SEED = 2333


@dataclass(frozen=True, kw_only=True)
class Laer:
    """Layouts compared by cost.

    Attributes:
        token_bytes: of an activation.
        compute_s: of one token, one pass.
        intra_bytes_s: bandwidth of a rank inside a node.
        inter_bytes_s: between nodes.
        perturbations: random changes tried of each candidate.
    """

    name: str = "laer"
    sees: Sees = "history"
    token_bytes: int = 8192
    compute_s: float = 1.48e-6
    intra_bytes_s: float = 216.3e9
    inter_bytes_s: float = 88.95e9
    perturbations: int = 2

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """The cheapest candidate; the first of equal ones."""
        found = [self._placed(problem, replicas_E) for replicas_E in self._candidates(problem)]
        _, slots_RS = min(found, key=lambda one: one[0])
        return LayerPlan(slots_RS=slots_RS, split="equal")

    def _candidates(self, problem: LayerProblem) -> list[IntArray]:
        """Numbers of replicas of each expert."""
        slots = problem.num_ranks * (problem.home_slots + problem.spare_slots)
        found = [replicas_by_load(problem.load_E, slots, problem.num_nodes, problem.num_ranks)]
        if slots % problem.num_experts == 0:
            found.insert(0, np.full(problem.num_experts, slots // problem.num_experts))
        rng = np.random.default_rng(SEED)
        for replicas_E in found[:]:
            found += [_perturbed(replicas_E, rng, problem.num_ranks) for _ in range(self.perturbations)]
        return found

    def _placed(self, problem: LayerProblem, replicas_E: IntArray) -> tuple[float, IntArray]:
        """A candidate's cost and slots."""
        num_slots = problem.home_slots + problem.spare_slots
        hosts_ER, load_R = (
            np.zeros((problem.num_experts, problem.num_ranks), dtype=np.int64),
            np.zeros(problem.num_ranks),
        )
        node_R = np.arange(problem.num_ranks) * problem.num_nodes // problem.num_ranks
        share_E = problem.load_E / replicas_E
        for expert in np.argsort(-share_E, kind="stable"):
            for _ in range(int(replicas_E[expert])):
                on_node_N = np.bincount(node_R, weights=hosts_ER[expert], minlength=problem.num_nodes)
                is_free_R = hosts_ER.sum(axis=0) < num_slots
                order = np.lexsort((load_R, on_node_N[node_R], ~is_free_R))
                hosts_ER[expert, order[0]] += 1
                load_R[order[0]] += share_E[expert]
        experts = [np.repeat(np.arange(problem.num_experts), hosts_ER[:, rank]).tolist() for rank in range(len(load_R))]
        return self._cost_s(problem, hosts_ER, node_R), fill_slots(experts, num_slots)

    def _cost_s(self, problem: LayerProblem, hosts_ER: IntArray, node_R: IntArray) -> float:
        """Seconds of a layer, all ranks' sending times added up."""
        sent_RR = np.zeros((problem.num_ranks, problem.num_ranks))
        for source, counts_E in enumerate(problem.counts_RE):
            near_ER = hosts_ER * (node_R == node_R[source])
            used_ER = np.where(near_ER.any(axis=1, keepdims=True), near_ER, hosts_ER)
            sent_RR[source] = (counts_E[:, None] * used_ER / used_ER.sum(axis=1, keepdims=True)).sum(axis=0)
        is_near_RR = node_R[:, None] == node_R[None, :]
        bytes_s = np.where(is_near_RR, self.intra_bytes_s, self.inter_bytes_s)
        sending_s = (sent_RR * self.token_bytes / bytes_s)[~np.eye(problem.num_ranks, dtype=np.bool_)].sum()
        return float(ALL_TO_ALLS * sending_s + PASSES * self.compute_s * sent_RR.sum(axis=0).max())


def replicas_by_load(load_E: IntArray, slots: int, num_nodes: int, num_ranks: int) -> IntArray:
    """Replicas of each expert, by the tokens that each has; one per node at least where the slots suffice for that."""
    each = num_nodes if num_nodes * len(load_E) <= slots else 1
    replicas_E = np.full(len(load_E), each, dtype=np.int64)
    is_open_E = np.ones(len(load_E), dtype=np.bool_)
    left = slots - int(replicas_E.sum())
    while left and is_open_E.any():
        expert = int(np.argmax(np.where(is_open_E, load_E / replicas_E, -1.0)))
        step = 1 if replicas_E[expert] < num_nodes else num_nodes
        if step > left or replicas_E[expert] + step > num_ranks:
            is_open_E[expert] = False
            continue
        replicas_E[expert] += step
        left -= step
    return replicas_E


def _perturbed(replicas_E: IntArray, rng: np.random.Generator, num_ranks: int) -> IntArray:
    """One replica moved from an expert that has several to another one."""
    givers, takers = np.nonzero(replicas_E > 1)[0], np.nonzero(replicas_E < num_ranks)[0]
    changed_E = replicas_E.copy()
    if len(givers) and len(takers):
        changed_E[rng.choice(givers)] -= 1
        changed_E[rng.choice(takers)] += 1
    return changed_E


def laer_traffic(home_E: IntArray, hosts_ER: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Weights and gradients of experts that rank r sends to rank q, `[R, R]` each; a rank stores an R-th of every one.

    Args:
        home_E: not read: no rank owns an expert.
        hosts_ER: the ranks that compute each expert.
    """
    num_ranks = hosts_ER.shape[1]
    fetch_RR = np.tile(hosts_ER.sum(axis=0) / num_ranks, (num_ranks, 1))
    np.fill_diagonal(fetch_RR, 0.0)
    return fetch_RR, fetch_RR.T.copy()
