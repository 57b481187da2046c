"""Loads that a launch is planned for, before and after balancing: the bridge from planner to placement.

Method. A scenario is a popularity of experts for several parts of the model (from first layer to last): from a recorded
trace, from a named skew, or, when nothing is known, from how the model balances its router. Each launch is priced under
every scenario with the homes, the replicas and the split that training would reach, computed by the very functions that
training calls. Flows are per token and are scaled to a launch's tokens, so each (EP, nodes, slots) is solved once.

The alternative, tokens x top-k / ranks for everyone, ranks launches by a load that no run ever has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_domain, busiest_ports
from megatron_smartmoe.cost.hierarchical import HopCounts
from megatron_smartmoe.cost.moe_layer import LayerCounts
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.layer_cost import relayed_flow
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.split import assign_sources, min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.placement import EMPTY, hosts_of, with_empty_slots
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

PARTS = 4  # parts of the model, each with a load of its own
SOURCE_TOKENS = 1 << 14  # assignments of one source rank: the resolution of a popularity
HOME_ROUNDS = 4  # re-evaluations of the homes, after which they rarely change
# Estimates of the hottest expert's load over the mean, by name. `smartmoe simulate` prints those of a recorded trace.
SKEWS = {"even": 1.0, "mild": 1.5, "uneven": 3.0, "strong": 6.0}
WORST_FACTOR = 2.0  # how much further from even the worst scenario is than the expected one


@dataclass(frozen=True, eq=False)
class Scenario:
    """A load with its weight.

    Attributes:
        name: for people.
        weight: of the scenario in an expected time.
        share_PE: shares of the assignments, `[parts, experts]`; each row sums to 1.
        notes: what an import of the recorded load left out or assumed.
    """

    name: str
    weight: float
    share_PE: FloatArray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Balance:
    """What of a launch decides the load of its ranks: EP ranks and their nodes, spare slots, and whether homes move."""

    ep: int
    nodes: int
    spare_slots: int
    homes: bool


def scenarios_of(model: ModelSpec, trace: Path | None, skew: str | None, prefix: str = "--") -> list[Scenario]:
    """The load that a command line asks for: a recorded one, a skew, or what the model suggests.

    Args:
        model: the model to train.
        trace: file or directory of a routing trace, or None.
        skew: a number, a name of `SKEWS`, or None.
        prefix: what the flags `--trace` and `--skew` begin with, for errors.

    Raises:
        ConfigError: the trace cannot be read or is of another model, or the skew is not a number or impossible.
    """
    if trace is not None:
        return scenarios_from_trace(model, load_trace(trace, field=f"{prefix}trace"), f"{prefix}trace")
    if skew is None:
        return scenarios_from_model(model)
    flag, most = f"{prefix}skew", model.moe.experts / model.moe.top_k
    if skew in SKEWS:
        return scenarios_from_skew(model, min(SKEWS[skew], most), f"{flag} {skew}")
    try:
        hottest = float(skew)
    except ValueError:
        rule = f"must be a number or one of {', '.join(SKEWS)}"
        raise ConfigError(flag, skew, rule, "For example 3, which gives one expert three times the mean.") from None
    if not 1.0 <= hottest <= most:
        rule = f"must be between 1 and {most:g}: no expert can get more than every token"
        raise ConfigError(flag, hottest, rule, f"For example {flag} {min(3.0, most):g}, or one of {', '.join(SKEWS)}.")
    return scenarios_from_skew(model, hottest, flag)


def scenarios_from_skew(model: ModelSpec, skew: float, source: str) -> list[Scenario]:
    """Zipf loads whose hottest expert has `skew` times the mean; the worst is `WORST_FACTOR` times as uneven."""
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

    Layers and records without assignments are left out: they have no popularity, and no imbalance.

    Raises:
        ConfigError: naming `flag`, if the trace is of another number of experts.
    """
    if trace.num_experts != model.moe.experts:
        rule = f"has {trace.num_experts} experts, the model has {model.moe.experts}"
        way_out = f"Pass a trace of this model, or {flag.replace('trace', 'skew')} 3."
        raise ConfigError(flag, trace.num_experts, rule, way_out)
    axes = tuple(range(2, trace.counts.ndim - 1))
    load_NLE = trace.counts.sum(axis=axes, dtype=np.float64)
    shares_N = [load_LE[load_LE.any(axis=-1)] for load_LE in load_NLE if load_LE.any()]
    shares_N = [load_LE / load_LE.sum(axis=-1, keepdims=True) for load_LE in shares_N]
    order = np.argsort([share_LE.max(axis=-1).mean() for share_LE in shares_N])
    num_records, num_layers = len(shares_N), int(load_NLE.any(axis=(0, 2)).sum())
    notes = trace.notes
    if (num_records, num_layers) != load_NLE.shape[:2]:
        kept = f"{num_records} of {trace.num_records} records and {num_layers} of {trace.num_layers} layers"
        notes = (*notes, f"{kept} have assignments, the others are left out")
    picks = (("trace, median record", 0.8, 0.5), ("trace, worst 5%", 0.2, 0.95))
    return [
        Scenario(name, weight, _parts(shares_N[order[int(at * (num_records - 1))]]), notes)
        for name, weight, at in picks
    ]


def _parts(share_LE: FloatArray) -> FloatArray:
    """`PARTS` layers of a record, from the first to the last."""
    layers: IntArray = np.unique(np.linspace(0, len(share_LE) - 1, PARTS).round().astype(np.int64))
    return np.asarray(share_LE[layers])


def scenarios_from_model(model: ModelSpec) -> list[Scenario]:
    """What to assume when nothing is known but how the router is balanced."""
    balanced = model.moe.expert_bias or (model.moe.balancing != "none" and model.moe.aux_loss_coeff > 0)
    skew = SKEWS["mild"] if balanced else SKEWS["uneven"]
    source = "a balanced router" if balanced else "a router without a balancing loss"
    return scenarios_from_skew(model, min(skew, model.moe.experts / model.moe.top_k), f"assumed for {source}")


@dataclass(frozen=True, eq=False)
class BalancedLoad:
    """A scenario on the ranks of a group.

    Attributes:
        counts_P: one per part of the model, for one assignment of each source rank.
    """

    counts_P: Sequence[LayerCounts]

    @property
    def hot(self) -> float:
        """The busiest rank's load over the mean, in the worst part."""
        return max(float(counts.tokens_R.max()) for counts in self.counts_P)


class LoadModel:
    """Scenarios, and the load of ranks in them by `Balance`, each computed once.

    Args:
        scenarios: loads with weights.
        cluster: decides where replicas may lie; None for the node of their home.
        num_groups: groups of group-limited routing, which homes keep whole; 1 for routing without.
    """

    def __init__(self, scenarios: Sequence[Scenario], cluster: ClusterSpec | None = None, num_groups: int = 1) -> None:
        self.scenarios, self._num_groups = list(scenarios), num_groups
        self._cluster = cluster
        self._balanced: dict[Balance, list[BalancedLoad]] = {}
        self._moved: dict[tuple[bytes, Balance], IntArray] = {}

    def after_balancing(self, balance: Balance) -> list[BalancedLoad]:
        """Per-rank load in each scenario after balancing."""
        if balance not in self._balanced:
            self._balanced[balance] = [self._balance(scenario, balance) for scenario in self.scenarios]
        return self._balanced[balance]

    def hottest_share(self, number: int) -> float:
        """The largest share of the assignments that so many experts have, in any scenario and part."""
        return max(float(np.sort(counts_E)[-number:].sum() / counts_E.sum()) for counts_E in self._counts())

    @property
    def least_active(self) -> int:
        """The fewest experts with assignments, in any scenario and part."""
        return min(int((counts_E > 0).sum()) for counts_E in self._counts())

    def _counts(self) -> list[IntArray]:
        return [_counts_E(share_E) for scenario in self.scenarios for share_E in scenario.share_PE]

    def _balance(self, scenario: Scenario, balance: Balance) -> BalancedLoad:
        return BalancedLoad([self._layer(share_E, balance) for share_E in scenario.share_PE])

    def _layer(self, share_E: FloatArray, balance: Balance) -> LayerCounts:
        """One layer; loads are in units of one rank's assignments, so that the mean rank has 1."""
        # Step 1: every source rank routes alike, experts in logical order.
        num_ranks, experts = balance.ep, len(share_E)
        counts_E = _counts_E(share_E)
        home_slots = experts // num_ranks
        slots_RS = np.arange(experts).reshape(num_ranks, home_slots)
        slots_RS = with_empty_slots(slots_RS, balance.spare_slots)
        # Step 2: move homes and place replicas, as training would.
        if balance.homes and num_ranks > 1:
            slots_RS = with_empty_slots(self._homes(counts_E, balance), balance.spare_slots)
        replica_nodes = self._domains(balance.nodes)
        if balance.spare_slots and num_ranks > 1:
            slots_RS = exact_replicas(counts_E * num_ranks, slots_RS, home_slots, replica_nodes)
        # Step 3: send the tokens, split among the replicas where there are any.
        scale = 1.0 / max(1, int(counts_E.sum()))
        if not (slots_RS[:, home_slots:] != EMPTY).any():
            return self._homes_alone(counts_E[slots_RS[:, :home_slots]], balance).scaled(scale)
        counts_RE = np.ascontiguousarray(np.broadcast_to(counts_E, (num_ranks, experts)))
        tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, experts))
        sent_RRS = assign_sources(counts_RE, slots_RS, tokens_ER, balance.nodes)
        load_ER, traffic_RR = tokens_ER.astype(np.float64), sent_RRS.sum(axis=2).astype(np.float64)
        flow = relayed_flow(slots_RS, load_ER, traffic_RR, balance.nodes)
        return LayerCounts.of(flow, self._ranks_of_levels(balance)).scaled(scale)

    def _homes_alone(self, counts_RH: IntArray, balance: Balance) -> LayerCounts:
        """A layer without replicas: what `LayerFlow.equal_split` leads to, without tables of experts x ranks.

        Args:
            counts_RH: assignments of one source rank for the expert in each home slot.
            balance: ranks and nodes.
        """
        to_R = counts_RH.sum(axis=1).astype(np.float64)
        traffic_RR = np.broadcast_to(to_R, (balance.ep, balance.ep))
        nothing = BusiestPorts(intra=0.0, inter_gpu=0.0, inter_node=0.0, inter_node_reverse=0.0)
        return LayerCounts(
            tokens_R=to_R * balance.ep,
            active_R=(counts_RH > 0).sum(axis=1),
            source_tokens=float(to_R.sum()),
            tokens=busiest_ports(traffic_RR, balance.nodes),
            fetched=nothing,
            returned=nothing,
            early_tokens=0.0,
            hops=HopCounts.of(traffic_RR, balance.nodes) if balance.nodes > 1 else None,
            leaving=tuple(busiest_domain(traffic_RR, ranks) for ranks in self._ranks_of_levels(balance)),
        )

    def _ranks_of_levels(self, balance: Balance) -> list[int]:
        """Ranks of the group in one domain of each level above the nodes."""
        levels = () if self._cluster is None else self._cluster.levels
        return [level.nodes * (balance.ep // balance.nodes) for level in levels]

    @property
    def within_node(self) -> bool:
        """Whether replicas stay on the node of their home."""
        return self._cluster is None or self._cluster.replica_scope == "node"

    def _domains(self, nodes: int) -> int:
        """Parts of the group that keep their replicas: its nodes too where it fills no whole domains of a level."""
        cluster = self._cluster
        if cluster is None:
            return nodes
        level = next((level for level in cluster.levels if level.name == cluster.replica_scope), None)
        if level is not None and nodes > level.nodes and nodes % level.nodes:
            return nodes
        return cluster.domains(nodes, cluster.replica_scope)

    def _homes(self, counts_E: IntArray, balance: Balance) -> IntArray:
        """Homes that even out the ranks or, where there are spare slots, however many, the nodes."""
        spare_slots = min(balance.spare_slots, 1)
        key = (counts_E.tobytes(), replace(balance, spare_slots=spare_slots))
        if key in self._moved:
            return self._moved[key]
        home_slots = len(counts_E) // balance.ep
        slots_RS = with_empty_slots(np.arange(len(counts_E)).reshape(balance.ep, home_slots), spare_slots)
        domains = self._domains(balance.nodes)
        options = HomesOptions(
            num_nodes=domains if domains > 1 else balance.nodes,
            replica_scope_is_node=domains > 1,
            num_groups=self._num_groups,
        )
        for _ in range(HOME_ROUNDS):
            plan = plan_homes(slots_RS, counts_E, home_slots, options)
            if not plan.swaps:
                break
            slots_RS = plan.slots_RS
        self._moved[key] = slots_RS[:, :home_slots]
        return self._moved[key]


def _counts_E(share_E: FloatArray) -> IntArray:
    """Assignments of one source rank."""
    return np.rint(share_E * SOURCE_TOKENS).astype(np.int64)
