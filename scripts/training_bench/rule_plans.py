"""Every rule's plans for a workload, made beforehand, as this project's executor runs them.

All rules hold the homes where they are and differ in replicas and in who computes which token. Those that move homes in
every step, or need more than one slot of a rank for an expert, have no place in the executor: their times are predicted
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_smartmoe.cli.policies import own_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.placement.layer_plan import Rule
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.runtime.replicas.split import homes_only, split_tokens
from megatron_smartmoe.simulate.baselines.contiguous import Contiguous
from megatron_smartmoe.simulate.baselines.echo import Echo
from megatron_smartmoe.simulate.baselines.llep import Llep
from megatron_smartmoe.simulate.baselines.lplb import Lplb
from megatron_smartmoe.simulate.baselines.moonep import MoonEp
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp
from megatron_smartmoe.simulate.policies import RulePolicy, SimulatedPolicy
from megatron_smartmoe.simulate.run import Applied, SimulationSetup, even_load_s, replay
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import EMPTY, Placement
from megatron_smartmoe.spec.trace import RoutingTrace
from scripts.training_bench.peers import sent_tokens, shadowing

EVEN, NONE = "even load", Contiguous.name
OURS: dict[str, ReplicaMode] = {"smartmoe-history": "history", "smartmoe-exact": "exact", "smartmoe-auto": "auto"}
Fetch = Literal["none", "ahead", "now", "instead"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The layer and its load.

    Attributes:
        ranks: R, one expert-parallel group.
        experts: E.
        top_k: experts of a token.
        tokens: of a rank in a step.
        hidden: H.
        ffn: inner size of an expert.
        spare_slots: K per rank; LLEP, MoonEP and FasterMoE take more where they want more.
    """

    ranks: int
    experts: int
    top_k: int
    tokens: int
    hidden: int
    ffn: int
    spare_slots: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """What a rule does in one step.

    Attributes:
        counts_RE: tokens of each source rank for each expert.
        slots_RS: homes, and replicas behind them.
        sent_RRS: tokens from each source rank to each slot.
        fetch: when the replicas' weights travel: `ahead` of the layer, `now` that the counts are there, or `instead` of
            those in `ahead_RS`, which had been fetched.
        ahead_RS: see `fetch`.
    """

    counts_RE: IntArray
    slots_RS: IntArray
    sent_RRS: IntArray
    fetch: Fetch
    ahead_RS: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class RulePlans:
    """A rule on a workload.

    Attributes:
        steps: those that count.
        predicted: seconds of the layer over those of an even load, by the cost model.
        max_over_mean: tokens of the busiest rank over the mean, mean over the steps.
    """

    steps: list[StepPlan]
    predicted: float
    max_over_mean: float


def plans_of(trace: RoutingTrace, sizes: Sizes, warmup: int, cluster: str) -> dict[str, RulePlans]:
    """Replay a workload through every rule; its first `warmup` steps are only planned for."""
    spec = load_cluster_spec(Path(cluster))
    prices = Prices(
        cluster=spec,
        expert=ExpertShape(hidden=sizes.hidden, ffn=sizes.ffn, element_bytes=4),
        num_ranks=sizes.ranks,
        num_nodes=1,
        micro_batches=1,
        rank_tokens=rank_tokens(trace, sizes.ranks),
    )
    setup = setup_of(prices, spare_slots=sizes.spare_slots, warmup=warmup)
    even_s = float(even_load_s(trace, setup).mean())
    start = Placement.contiguous(
        num_layers=1, num_experts=sizes.experts, num_ranks=sizes.ranks, spare_slots=sizes.spare_slots
    )
    # 1,024 tokens are what a piece of work has to be worth on a GPU: here a whole rank has no more
    peers: tuple[Rule, ...] = (
        Contiguous(),
        shadowing(spec, hidden=sizes.hidden, ffn=sizes.ffn),
        Echo(),
        UltraEp(min_tokens_per_replica=1),
        Llep(min_tokens=1),
        MoonEp(),
        Lplb(),
    )
    own = {name: own_policy(mode, start, 1, setup, prices, homes_interval=0) for name, mode in OURS.items()}
    found = {
        name: _found(trace, policy, setup, even_s)
        for name, policy in (own | {rule.name: RulePolicy(rule, start, 1, 1, 1) for rule in peers}).items()
    }
    even = [_at_home(_even(step.counts_RE)) for step in found[NONE].steps]
    return {EVEN: RulePlans(steps=even, predicted=1.0, max_over_mean=1.0), **found}


def _found(trace: RoutingTrace, policy: SimulatedPolicy, setup: SimulationSetup, even_s: float) -> RulePlans:
    applied: list[Applied] = []
    result = replay(trace, policy, setup, watch=applied.append)
    return RulePlans(
        steps=[_step(each) for each in applied],
        predicted=result.total_s / even_s,
        max_over_mean=float(result.imbalance.mean()),
    )


def _step(applied: Applied) -> StepPlan:
    """A plan as the executor runs it: whole tokens from every source rank to every slot."""
    planned, counts_RE = applied.planned, applied.counts_RE
    slots_RS, home_slots = planned.plan.slots_RS, counts_RE.shape[1] // len(counts_RE)
    assert (slots_RS[:, :home_slots].ravel() == np.arange(counts_RE.shape[1])).all(), "the rule moves homes"
    if (slots_RS[:, home_slots:] == EMPTY).all() and planned.kept is None:
        return _at_home(counts_RE)
    fetch: Fetch = "now" if planned.mode == "exact" else "ahead"
    return StepPlan(
        counts_RE=counts_RE,
        slots_RS=slots_RS,
        sent_RRS=sent_tokens(planned.plan, counts_RE),
        fetch=fetch if planned.kept is None else "instead",
        ahead_RS=None if planned.kept is None else planned.kept.slots_RS,
    )


def _at_home(counts_RE: IntArray) -> StepPlan:
    """No replicas."""
    slots_RS = homes_only(counts_RE.shape[1], len(counts_RE), 0)
    sent_RRS = split_tokens(counts_RE, slots_RS, slots_RS.shape[1])
    return StepPlan(counts_RE=counts_RE, slots_RS=slots_RS, sent_RRS=sent_RRS, fetch="none")


def _even(counts_RE: IntArray) -> IntArray:
    """As many tokens, the same for every expert; what is left over goes to the first experts, a rank after another."""
    num_ranks, num_experts = counts_RE.shape
    even_RE = np.repeat(counts_RE.sum(axis=1)[:, None] // num_experts, num_experts, axis=1)
    by_rank = np.arange(num_experts).reshape(num_ranks, -1).T.ravel()
    for source, missing in enumerate(counts_RE.sum(axis=1) - even_RE.sum(axis=1)):
        even_RE[source, by_rank[:missing]] += 1
    return even_RE
