"""The replay itself: for every record, plan from what came before, evaluate on what comes, then show it to the policy.

Imbalance is the largest rank load over the mean, per layer, expert-parallel group and micro-batch; that is what the
slowest rank makes everybody wait for. The lower bound beside it is what no placement with these slots could beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, layer_time
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.plan import LayerPlan, evaluate
from megatron_smartmoe.placement.simulate.policies import Books, SimulatedPolicy
from megatron_smartmoe.placement.types import FloatArray
from megatron_smartmoe.spec.placement import IntArray, hosts_of
from megatron_smartmoe.spec.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated.

    Attributes:
        num_ranks: R, ranks of an expert-parallel group.
        spare_slots: K per rank.
        num_nodes: nodes that a group's ranks lie on.
        warmup: records at the start that are replayed but not counted.
        constants: seconds per count of the layer, from a cluster and an expert's shape.
        state_bytes: of one expert's weights, main weights and moments.
    """

    num_ranks: int
    spare_slots: int = 0
    num_nodes: int = 1
    warmup: int = 25
    constants: LayerConstants
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """One policy over the counted records; `imbalance` has one value per record, layer, group and micro-batch."""

    name: str
    imbalance: FloatArray
    layer_s: FloatArray
    books: Books
    decisions: list[Decision]


def replay(
    trace: RoutingTrace, policy: SimulatedPolicy, setting: Setting, records: Iterable[int] | None = None
) -> PolicyResult:
    """Run one policy over the trace.

    Args:
        trace: what was routed.
        policy: fresh, it has seen nothing yet.
        setting: ranks, slots, costs.
        records: their numbers, in order; wrap them to show progress. None takes all.
    """
    imbalance: list[float] = []
    layer_s: list[float] = []
    for record in range(trace.num_records) if records is None else records:
        if record == setting.warmup:
            policy.books = Books()
        counts_LGMRE = trace.groups(setting.num_ranks, record)
        policy.before(int(trace.iteration[record]))
        for layer, group, micro in np.ndindex(*counts_LGMRE.shape[:3]):
            counts_RE = counts_LGMRE[layer, group, micro]
            plan = policy.plan(layer, group, counts_RE)
            if record >= setting.warmup:
                seconds, worst = _measure(plan, counts_RE, policy.homes(layer), setting)
                layer_s.append(seconds)
                imbalance.append(worst)
        policy.observe(counts_LGMRE)
    return PolicyResult(
        name=policy.name,
        imbalance=np.array(imbalance),
        layer_s=np.array(layer_s),
        books=policy.books,
        decisions=policy.decisions,
    )


def lower_bounds(trace: RoutingTrace, setting: Setting) -> FloatArray:
    """What no placement can beat, for every record, layer, group and micro-batch counted.

    Whole tokens; with spare slots an expert may be on every rank; without, it shares its rank with the coldest ones.
    """
    bounds = []
    for record in range(setting.warmup, trace.num_records):
        load = np.sort(trace.groups(setting.num_ranks, record).sum(axis=-2).reshape(-1, trace.num_experts), axis=1)
        total = load.sum(axis=1)
        least = -(-total // setting.num_ranks)
        if not setting.spare_slots:
            homes = trace.num_experts // setting.num_ranks
            least = np.maximum(least, load[:, -1] + load[:, : homes - 1].sum(axis=1))
        bounds.append(least * setting.num_ranks / np.maximum(total, 1))
    return np.concatenate(bounds)


def layer_seconds(setting: Setting) -> Callable[[IntArray, IntArray], float]:
    """The cost model as the planners ask it: seconds of a layer under a slot table with the exact split."""

    def seconds(slots_RS: IntArray, counts_RE: IntArray) -> float:
        home_slots = counts_RE.shape[1] // len(slots_RS)
        home_E = np.argsort(slots_RS[:, :home_slots].ravel(), kind="stable") // home_slots
        return _measure(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE, home_E, setting)[0]

    return seconds


def _measure(plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, setting: Setting) -> tuple[float, float]:
    """Predicted seconds of the layer, and max / mean tokens per rank."""
    outcome = evaluate(plan, counts_RE, setting.num_nodes)
    expert, rank = np.nonzero(hosts_of(plan.slots_RS, counts_RE.shape[1]))
    copy = rank != home_E[expert]
    copies_RR = np.zeros((setting.num_ranks, setting.num_ranks))
    np.add.at(copies_RR, (home_E[expert[copy]], rank[copy]), 1.0)
    flow = LayerFlow(
        load_ER=outcome.load_ER, traffic_RR=outcome.traffic_RR, copies_RR=copies_RR, num_nodes=setting.num_nodes
    )
    load_R = outcome.load_ER.sum(axis=0)
    return layer_time(flow, setting.constants).total_s, float(load_R.max() / max(load_R.mean(), 1e-300))
