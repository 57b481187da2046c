"""Loads that a launch is planned for, and what the online phase makes of them: the bridge from planner to placement.

Method. A scenario is a popularity of experts for several parts of the model (from first layer to last): from a recorded
trace, from a named skew, or, when nothing is known, from how the model balances its router. Each launch meets every
scenario with the homes, the replicas and the split that training would have reached, made by the very functions that
training calls. The flows are per token and are scaled to a launch's tokens, so each (EP, nodes, slots) is solved once.

The alternative, tokens x top-k / ranks for everyone, ranks launches by a load that no run ever has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_smartmoe.cost.comm import replica_traffic
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.split import assign_sources, min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.placement import EMPTY, hosts_of, with_empty_slots
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

PARTS = 4  # of the model, each with a load of its own
SOURCE_TOKENS = 1 << 14  # assignments of one source rank, the resolution of a popularity
HOME_ROUNDS = 4  # looks at the homes until they have settled
SKEWS = {"even": 1.0, "mild": 1.5, "uneven": 3.0, "strong": 6.0}
WORST_FACTOR = 2.0  # the worst scenario's distance from even, over the expected one's


@dataclass(frozen=True, eq=False)
class Scenario:
    """A load: share of the assignments by part of the model and expert; every row sums to 1."""

    name: str
    weight: float
    share_PE: FloatArray


@dataclass(frozen=True)
class Balance:
    """What of a launch decides how a load falls: group, its nodes, spare slots, and which loops run."""

    ep: int
    nodes: int
    spare_slots: int
    homes: bool


def scenarios_of(model: ModelSpec, trace: Path | None, skew: str | None, prefix: str = "--") -> list[Scenario]:
    """The load that a command line asks for: a recorded one, a skew, or what the model suggests.

    Args:
        model: what is trained.
        trace: file or directory of a routing trace.
        skew: a number, or a name of `SKEWS`.
        prefix: of the flags' names, `--trace` and `--skew`, in errors.

    Raises:
        ConfigError: a trace of another model or none at all, or a skew that is no number or impossible.
    """
    if trace is not None:
        return scenarios_from_trace(model, load_trace(trace), f"{prefix}trace")
    if skew is None:
        return scenarios_from_model(model)
    flag, most = f"{prefix}skew", model.moe.experts / model.moe.top_k
    if skew in SKEWS:
        return scenarios_from_skew(model, min(SKEWS[skew], most), f"{flag} {skew}")
    try:
        hottest = float(skew)
    except ValueError:
        rule = f"must be a number or one of {', '.join(SKEWS)}"
        raise ConfigError(flag, skew, rule, "1 is even, 3 gives one expert three times the mean.") from None
    if not 1.0 <= hottest <= most:
        rule = f"must be between 1 and {most:g}: no expert can get more than every token"
        raise ConfigError(flag, hottest, rule, f"Choose another, or one of {', '.join(SKEWS)}.")
    return scenarios_from_skew(model, hottest, flag)


def scenarios_from_skew(model: ModelSpec, skew: float, source: str) -> list[Scenario]:
    """Zipf loads whose hottest expert has `skew` times the mean; the worst is `WORST_FACTOR` as far from even."""
    most = model.moe.experts / model.moe.top_k
    worst = min(most, 1 + (skew - 1) * WORST_FACTOR)
    rng = np.random.default_rng(0)

    def shares(hottest: float) -> FloatArray:
        share_E = zipf(model.moe.experts, hottest / model.moe.experts)
        return np.stack([share_E[rng.permutation(len(share_E))] for _ in range(PARTS)])

    return [
        Scenario(f"{source}: hottest expert {skew:.2g}x", 0.8, shares(skew)),
        Scenario(f"worst: hottest expert {worst:.2g}x", 0.2, shares(worst)),
    ]


def zipf(experts: int, hottest_share: float) -> FloatArray:
    """Zipf popularity whose first expert has `hottest_share`; exponent by bisection."""
    place_E = np.arange(1, experts + 1, dtype=np.float64)
    low, high = 0.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        share_E = place_E**-middle
        low, high = (middle, high) if share_E[0] / share_E.sum() < hottest_share else (low, middle)
    share_E = place_E**-high
    return np.asarray(share_E / share_E.sum())


def scenarios_from_trace(model: ModelSpec, trace: RoutingTrace, flag: str = "--trace") -> list[Scenario]:
    """The median record and the one at the 95th percentile of imbalance, layers in `PARTS` places.

    Raises:
        ConfigError: naming `flag`, if the trace is of another number of experts.
    """
    if trace.num_experts != model.moe.experts:
        rule = f"has {trace.num_experts} experts, the model {model.moe.experts}"
        way_out = f"Record one with this model, or use {flag.replace('trace', 'skew')}."
        raise ConfigError(flag, trace.num_experts, rule, way_out)
    axes = tuple(range(2, trace.counts.ndim - 1))
    load_NLE = trace.counts.sum(axis=axes, dtype=np.float64)
    load_NLE /= np.maximum(load_NLE.sum(axis=-1, keepdims=True), 1)
    order = np.argsort(load_NLE.max(axis=-1).mean(axis=-1))
    layers = np.unique(np.linspace(0, trace.num_layers - 1, PARTS).round().astype(int))
    picks = (("trace, median record", 0.8, 0.5), ("trace, worst 5%", 0.2, 0.95))
    return [Scenario(name, weight, load_NLE[order[int(at * (len(order) - 1))]][layers]) for name, weight, at in picks]


def scenarios_from_model(model: ModelSpec) -> list[Scenario]:
    """Nothing is known but how the router is balanced."""
    balanced = model.moe.expert_bias or (model.moe.balancing != "none" and model.moe.aux_loss_coeff > 0)
    skew = SKEWS["mild"] if balanced else SKEWS["uneven"]
    source = "a balanced router" if balanced else "a router without a balancing loss"
    return scenarios_from_skew(model, min(skew, model.moe.experts / model.moe.top_k), f"assumed for {source}")


@dataclass(frozen=True, eq=False)
class Fallen:
    """A scenario as it falls on ranks: per part, flows per assignment of one source rank, and the busiest rank."""

    flows: Sequence[LayerFlow]
    hot_P: FloatArray

    @property
    def hot(self) -> float:
        """The busiest rank's load over the mean, in the worst part."""
        return float(self.hot_P.max())


class LoadModel:
    """Scenarios, and how they fall under every balance that has been asked for.

    Args:
        scenarios: loads with weights.
        replica_scope_is_node: replicas stay on the node of their home.
    """

    def __init__(self, scenarios: Sequence[Scenario], *, replica_scope_is_node: bool = True) -> None:
        self.scenarios = list(scenarios)
        self.within_node = replica_scope_is_node
        self._fallen: dict[Balance, list[Fallen]] = {}

    def fallen(self, balance: Balance) -> list[Fallen]:
        """Each scenario under a balance."""
        if balance not in self._fallen:
            self._fallen[balance] = [self._fall(scenario, balance) for scenario in self.scenarios]
        return self._fallen[balance]

    def _fall(self, scenario: Scenario, balance: Balance) -> Fallen:
        flows = [self._layer(share_E, balance) for share_E in scenario.share_PE]
        hot_P = [float(flow.load_ER.sum(axis=0).max()) for flow in flows]
        return Fallen(flows, np.array(hot_P))

    def _layer(self, share_E: FloatArray, balance: Balance) -> LayerFlow:
        """One layer; loads are in units of one rank's assignments, so that the mean rank has 1."""
        num_ranks, experts = balance.ep, len(share_E)
        counts_E = np.rint(share_E * SOURCE_TOKENS).astype(np.int64)
        counts_RE = np.ascontiguousarray(np.broadcast_to(counts_E, (num_ranks, experts)))
        home_slots = experts // num_ranks
        slots_RS = np.arange(experts).reshape(num_ranks, home_slots)
        slots_RS = with_empty_slots(slots_RS, balance.spare_slots)
        if balance.homes and num_ranks > 1:
            slots_RS = self._homes(slots_RS, counts_E, home_slots, balance)
        replica_nodes = balance.nodes if self.within_node else 1
        if balance.spare_slots and num_ranks > 1:
            slots_RS = exact_replicas(counts_E * num_ranks, slots_RS, home_slots, replica_nodes)
        scale = 1.0 / max(1, int(counts_E.sum()))
        if not (slots_RS[:, home_slots:] != EMPTY).any():
            return scaled(LayerFlow.equal_split(counts_RE, slots_RS, num_nodes=balance.nodes), scale)
        tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, experts))
        sent_RRS = assign_sources(counts_RE, slots_RS, tokens_ER, balance.nodes)
        flow = LayerFlow(
            load_ER=tokens_ER.astype(np.float64),
            traffic_RR=sent_RRS.sum(axis=2).astype(np.float64),
            replicas_RR=replica_traffic(slots_RS, experts),
            num_nodes=balance.nodes,
        )
        return scaled(flow, scale)

    def _homes(self, slots_RS: IntArray, counts_E: IntArray, home_slots: int, balance: Balance) -> IntArray:
        options = HomesOptions(num_nodes=balance.nodes, replica_scope_is_node=self.within_node)
        for _ in range(HOME_ROUNDS):
            plan = plan_homes(slots_RS, counts_E, home_slots, options)
            if not plan.swaps:
                break
            slots_RS = plan.slots_RS
        return slots_RS


def scaled(flow: LayerFlow, tokens: float) -> LayerFlow:
    """The flow at `tokens` assignments of one source rank."""
    return LayerFlow(
        load_ER=flow.load_ER * tokens,
        traffic_RR=flow.traffic_RR * tokens,
        replicas_RR=flow.replicas_RR,
        num_nodes=flow.num_nodes,
    )
