"""MoonEP: every rank gets exactly the mean, from the exact load, with homes fixed.

Method. First between ranks: the most loaded home rank fills up the emptiest rank to the mean, completely, again and
again until no rank is above it; each step settles one receiver, so there are at most R - 1 flows and every receiver but
few has one sender. Then inside each sender: its largest flow takes from its expert with the most tokens left, until all
flows are served. Nothing bounds the replicas on a rank by construction (E / R slots are reserved); two incoming experts
have been enough on all loads tried. The problem's number of spare slots is ignored: this rule takes what it needs.

Source: github.com/MoonshotAI/MoonEP (MIT), its planning kernel and tests/planning_reference.py (read in the fork
zhumakhan/MoonEP). There every rank has the same number of tokens, so the mean is whole; here a remainder goes to the
first ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of


@dataclass(frozen=True, kw_only=True)
class MoonEp:
    """Exact balance."""

    name: str = "moonep"
    sees: Sees = "exact"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Flows between ranks, then tokens of experts."""
        # Step 1: flows between ranks, after which every rank has the mean.
        home_ER = hosts_of(problem.slots_RS[:, : problem.home_slots], problem.num_experts)
        quota_ER = np.where(home_ER, problem.load_E[:, None], 0)
        flow_RR = rank_flows(quota_ER.sum(axis=0))
        # Step 2: choose the tokens of each sender's flows.
        for source in range(problem.num_ranks):
            _serve(quota_ER, source, flow_RR[source])
        replica_ER = (quota_ER > 0) & ~home_ER
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="quota", quota_ER=quota_ER)


def rank_flows(load_R: IntArray) -> IntArray:
    """Tokens from rank r to rank q, `[R, R]`, after which all have the mean."""
    num_ranks = len(load_R)
    mean, rest = divmod(int(load_R.sum()), num_ranks)
    balance_R = load_R - mean - (np.arange(num_ranks) < rest)
    flow_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    while balance_R.max() > 0:
        source, target = int(np.argmax(balance_R)), int(np.argmin(balance_R))
        flow_RR[source, target] -= balance_R[target]
        balance_R[source] += balance_R[target]
        balance_R[target] = 0
    return flow_RR


def _serve(quota_ER: IntArray, source: int, flow_R: IntArray) -> None:
    """Move whole flows out of `source`'s own experts, largest flow from largest expert; `quota_ER` changes."""
    left_R, left_E = flow_R.copy(), quota_ER[:, source].copy()
    while left_R.max() > 0:
        target, expert = int(np.argmax(left_R)), int(np.argmax(left_E))
        take = min(int(left_R[target]), int(left_E[expert]))
        quota_ER[expert, source] -= take
        quota_ER[expert, target] += take
        left_R[target] -= take
        left_E[expert] -= take
