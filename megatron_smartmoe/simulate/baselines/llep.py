"""LLEP: what a rank has above its capacity spills to the least loaded ranks, weights with it.

Method. Nothing is done while the busiest rank is below `start_at` times the mean. Else every rank has a capacity, a
factor times the mean. Experts go in order of falling load. An expert stays at home as far as its rank has room, with
what that rank's later experts will bring; the rest spills to other ranks, the least loaded first, as much as fits each.
A piece below `min_tokens` is not worth a GEMM and is passed on, unless it is all that is left; what no rank takes goes
to the least loaded one, above its capacity. When part of an expert stays at home, the ranks are sorted anew before each
piece; when all of it spills they are gone through once. Nothing bounds the replicas on a rank.

Source: "Least-Loaded Expert Parallelism" (arXiv 2601.17111), LLA; llep/gpt_oss_llep.py of
github.com/SalesforceAIResearch/LeastLoadedEP (Apache-2.0). Defaults: capacity 1.1, 1024 tokens a GEMM, start at 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of


@dataclass(frozen=True, kw_only=True)
class Llep:
    """Least-loaded spill, homes fixed.

    Attributes:
        capacity_factor: capacity of a rank over the mean rank load.
        min_tokens: a smaller piece of an expert is not computed elsewhere.
        start_at: max / mean tokens per rank below which nothing is done.
    """

    name: str = "llep"
    sees: Sees = "exact"
    capacity_factor: float = 1.1
    min_tokens: int = 1024
    start_at: float = 1.3

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Spill from the experts with the most tokens to the ranks with the fewest."""
        home_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        quota_ER = np.where(home_ER, problem.load_E[:, None], 0)
        load_R = quota_ER.sum(axis=0)
        if load_R.max() * problem.num_ranks >= self.start_at * max(1, load_R.sum()):
            quota_ER = self._spilled(problem)
        replica_ER = (quota_ER > 0) & ~home_ER
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="quota", quota_ER=quota_ER)

    def _spilled(self, problem: LayerProblem) -> IntArray:
        """Tokens of expert e on rank r, `[E, R]`."""
        load_E, home_E = problem.load_E, problem.home_rank_E
        capacity = max(1, int(self.capacity_factor * (int(load_E.sum()) // problem.num_ranks)))
        # What every rank will have: its share so far, and its own experts that have not had their turn.
        taken_R = np.bincount(home_E, weights=load_E, minlength=problem.num_ranks).astype(np.int64)
        quota_ER = np.zeros((problem.num_experts, problem.num_ranks), dtype=np.int64)
        for expert in np.argsort(-load_E, kind="stable"):
            home, tokens = int(home_E[expert]), int(load_E[expert])
            taken_R[home] -= tokens
            stays = int(np.clip(capacity - taken_R[home], 0, tokens))
            quota_ER[expert, home] += stays
            taken_R[home] += stays
            if stays < tokens:
                self._spill(quota_ER[expert], taken_R, home, tokens - stays, capacity, sort_again=stays > 0)
        return quota_ER

    def _spill(
        self, quota_R: IntArray, taken_R: IntArray, home: int, rest: int, capacity: int, *, sort_again: bool
    ) -> None:
        """Give `rest` tokens of one expert to other ranks than its home; `quota_R` and `taken_R` change."""
        waiting = _least_first(taken_R, home)
        while rest and waiting:
            at = next((i for i, rank in enumerate(waiting) if self._fits(capacity - int(taken_R[rank]), rest)), None)
            if at is None:
                break
            take = min(rest, capacity - int(taken_R[waiting[at]]))
            quota_R[waiting[at]] += take
            taken_R[waiting[at]] += take
            rest -= take
            waiting = _least_first(taken_R, home) if sort_again else waiting[at + 1 :]
        if rest:
            least = _least_first(taken_R, home)[0] if len(taken_R) > 1 else home
            quota_R[least] += rest
            taken_R[least] += rest

    def _fits(self, room: int, rest: int) -> bool:
        """Whether a rank with this room takes a piece that is worth a GEMM, or all that is left."""
        take = min(rest, room)
        return take > 0 and (take >= self.min_tokens or take == rest)


def _least_first(taken_R: IntArray, home: int) -> list[int]:
    return [rank for rank in np.argsort(taken_R, kind="stable").tolist() if rank != home]
