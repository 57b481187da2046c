"""The replay: for every record, plan from the records before it, evaluate on it, then let the policy observe it.

Imbalance is the largest rank load over the mean, per layer, expert-parallel group and micro-batch; all
ranks wait for the slowest one. The lower bound beside it is what no placement with these slots could beat. Where there
are no assignments (a dense layer in the record of a whole model, a pass without tokens) there is no mean: such entries
are left out of everything, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, Dispatcher
from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.placement import layer_cost
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import (
    LayerPricing,
    Relay,
    migration_s,
    price_layer,
)
from megatron_smartmoe.placement.layer_plan import Sees
from megatron_smartmoe.simulate.policies import Planned, SimulatedPolicy, Stats
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import hosts_of
from megatron_smartmoe.spec.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class SimulationSetup:
    """The ranks, slots and prices that a trace is replayed with.

    Attributes:
        num_ranks: R, ranks of an expert-parallel group.
        spare_slots: K per rank.
        num_nodes: nodes that a group's ranks are on.
        warmup: records at the start that are replayed but not counted.
        constants: seconds per count of the layer, from a cluster and an expert's shape.
        state_bytes: bytes of one expert's weights, main weights and moments.
        migration_bytes_s: bandwidth of a rank while homes move.
        prices: of a layer whose replicas come from history or from exact counts; a missing one is made of `constants`.
        kernels: what plans and splits; all of them find the same.
        dispatcher: what sends the tokens.
    """

    num_ranks: int
    spare_slots: int = 0
    num_nodes: int = 1
    warmup: int = 25
    constants: LayerConstants
    state_bytes: int
    migration_bytes_s: float = math.inf
    prices: Mapping[Sees, LayerPricing] = field(default_factory=dict)
    kernels: Kernels = NUMPY
    dispatcher: Dispatcher = ALL_TO_ALL

    @property
    def pricing(self) -> LayerPricing:
        """The price of a layer of one group whose replicas travel in every micro-batch, nothing hidden."""
        return LayerPricing(
            num_ranks=self.num_ranks,
            num_nodes=self.num_nodes,
            constants=self.constants,
            dispatcher=self.dispatcher,
        )

    def pricing_of(self, mode: Sees, relay: Relay | None = None, *, has_trees: bool = False) -> LayerPricing:
        """The price of a layer of one group, its replicas planned in this way and forwarded like this."""
        kept = self.prices.get("history", self.pricing).replicas
        found = self.prices.get(mode, self.pricing)
        return replace(found, kept=kept, relay=relay, has_trees=has_trees, kernels=self.kernels)


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """One policy over the counted records, one value per record, layer, group and micro-batch.

    Attributes:
        name: the policy's.
        imbalance: max / mean tokens per rank.
        layer_s: predicted seconds of the layer.
        moving_s: its share of the seconds in which homes move, those of a record over its iterations and micro-batches.
        end_N: number of values up to the end of each counted record.
        stats: what moved, and how long planning took.
        decisions: of ours.
    """

    name: str
    imbalance: FloatArray
    layer_s: FloatArray
    moving_s: FloatArray
    end_N: IntArray
    stats: Stats
    decisions: list[Decision]

    @property
    def total_s(self) -> float:
        """Mean seconds of a layer and micro-batch, moves of homes included."""
        return float((self.layer_s + self.moving_s).mean())


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A plan as the replay applies it to the counts of one layer and micro-batch.

    Attributes:
        record: its number.
        layer: row of the layer.
        group: expert-parallel group.
        counts_RE: the counts.
        planned: slots and split.
    """

    record: int
    layer: int
    group: int
    counts_RE: IntArray
    planned: Planned


def replay(
    trace: RoutingTrace,
    policy: SimulatedPolicy,
    setup: SimulationSetup,
    records: Iterable[int] | None = None,
    watch: Callable[[Applied], None] | None = None,
    whole: RoutingTrace | None = None,
) -> PolicyResult:
    """Replay a trace through one policy.

    Args:
        trace: routing counts, record by record.
        policy: a policy that has observed nothing yet.
        setup: ranks, slots and prices.
        records: numbers of the records in order, wrapped to show progress; None takes all of them.
        watch: called with every plan of a counted record, for those who count something else.
        whole: the trace that this one has a part of the layers of; None for itself.
    """
    whole = trace if whole is None else whole
    imbalance: list[float] = []
    layer_s: list[float] = []
    moving_s: list[float] = []
    ends: list[int] = []
    layers = range(trace.num_layers)
    for record in range(trace.num_records) if records is None else records:
        if record == setup.warmup:
            policy.stats = Stats()
        counts_LGMRE = trace.groups(setup.num_ranks, record)
        # Step 1: plan from the records before this one; what homes that move take is shared by the record's iterations.
        before_L = [policy.homes(layer) for layer in layers]
        policy.before(int(trace.iteration[record]))
        share = 1.0 / (_iterations(trace, record) * max(1, whole.num_micro_batches(record)))
        moves_s = [_moving_s(before_L[layer], policy.homes(layer), setup) * share for layer in layers]
        # Step 2: apply the plan to every micro-batch; exact rules plan here, from its counts.
        for layer, group in np.ndindex(*counts_LGMRE.shape[:2]):
            counts_MRE = [counts_RE for counts_RE in counts_LGMRE[layer, group] if counts_RE.any()]
            planned_M = _returned([policy.plan(layer, group, counts_RE) for counts_RE in counts_MRE])
            _count_replicas(policy.stats, planned_M, trace.num_experts)
            for counts_RE, planned in zip(counts_MRE, planned_M, strict=True):
                if record < setup.warmup:
                    break
                seconds, worst = price(planned, counts_RE, policy, layer, setup)
                layer_s.append(seconds)
                imbalance.append(worst)
                moving_s.append(moves_s[layer])
                if watch is not None:
                    watch(Applied(record=record, layer=layer, group=group, counts_RE=counts_RE, planned=planned))
        if record >= setup.warmup:
            ends.append(len(imbalance))
        # Step 3: observe the record.
        policy.observe(counts_LGMRE)
    return PolicyResult(
        name=policy.name,
        imbalance=np.array(imbalance),
        layer_s=np.array(layer_s),
        moving_s=np.array(moving_s),
        end_N=np.array(ends, dtype=np.int64),
        stats=policy.stats,
        decisions=policy.decisions,
    )


def price(
    planned: Planned, counts_RE: IntArray, policy: SimulatedPolicy, layer: int, setup: SimulationSetup
) -> tuple[float, float]:
    """Seconds of the layer, replicas from history that it does not use included, and its max / mean tokens per rank."""
    homes_E = policy.homes(layer)
    pricing = setup.pricing_of(planned.mode, policy.relay, has_trees=policy.has_trees)
    return price_layer(planned.plan, counts_RE, homes_E, pricing, planned.kept)


def _returned(planned_M: list[Planned]) -> list[Planned]:
    """The plans of a layer's micro-batches in one iteration. Where all were planned anew, no micro-batch has used the
    replicas from history, and they have no gradients that go home."""
    if not all(planned.kept is not None for planned in planned_M):
        return planned_M
    return [
        replace(planned, kept=replace(planned.kept, returns=False)) for planned in planned_M if planned.kept is not None
    ]


def _count_replicas(stats: Stats, planned_M: list[Planned], num_experts: int) -> None:
    """Count what the replicas of a layer's micro-batches in one record send, as it is priced."""
    for planned in planned_M:
        if planned.mode == "exact":
            num_replicas = _num_replicas(planned.plan.slots_RS, num_experts)
            stats.replicas_made += num_replicas
            stats.replicas_returned += num_replicas
    # those from history are the same in all micro-batches, and in the first of them if in any
    for planned in planned_M[:1]:
        if planned.mode == "history":
            num_replicas = _num_replicas(planned.plan.slots_RS, num_experts)
        elif planned.kept is not None:
            num_replicas = _num_replicas(planned.kept.slots_RS, num_experts)
        else:
            continue
        stats.replicas_made += num_replicas
        stats.replicas_returned += num_replicas * (planned.kept is None or planned.kept.returns)


def _num_replicas(slots_RS: IntArray, num_experts: int) -> int:
    return int(hosts_of(slots_RS, num_experts).sum()) - num_experts


def _moving_s(before_E: IntArray, after_E: IntArray, setup: SimulationSetup) -> float:
    """Seconds that one layer's homes take to move."""
    return migration_s(before_E, after_E, setup.num_ranks, setup.state_bytes, setup.migration_bytes_s)


def _iterations(trace: RoutingTrace, record: int) -> int:
    """Training iterations from the record before to this one."""
    return max(1, int(trace.iteration[record]) - int(trace.iteration[record - 1])) if record else 1


def even_load_s(trace: RoutingTrace, setup: SimulationSetup) -> FloatArray:
    """Predicted seconds of every counted layer and micro-batch if its tokens were spread evenly over all experts."""
    seconds: dict[int, float] = {}
    found = []
    for record in range(setup.warmup, trace.num_records):
        for tokens in trace.groups(setup.num_ranks, record).sum(axis=(-2, -1)).ravel().tolist():
            if tokens and tokens not in seconds:
                seconds[tokens] = layer_cost.even_load_s(tokens, trace.num_experts, setup.pricing)
            if tokens:
                found.append(seconds[tokens])
    return np.array(found)


def lower_bounds(trace: RoutingTrace, setup: SimulationSetup) -> FloatArray:
    """The imbalance that no placement can beat, for every counted record, layer, group and micro-batch.

    In whole tokens. With spare slots an expert may be on every rank, so the mean, rounded up, is the bound; without
    them the hottest expert's rank also holds E / R - 1 others, at best the coldest ones.
    """
    bounds = []
    for record in range(setup.warmup, trace.num_records):
        load = np.sort(trace.groups(setup.num_ranks, record).sum(axis=-2).reshape(-1, trace.num_experts), axis=1)
        load = load[load.any(axis=1)]
        total = load.sum(axis=1)
        least = -(-total // setup.num_ranks)
        if not setup.spare_slots:
            homes = trace.num_experts // setup.num_ranks
            least = np.maximum(least, load[:, -1] + load[:, : homes - 1].sum(axis=1))
        bounds.append(least * setup.num_ranks / total)
    found = np.concatenate(bounds)
    assert (found >= 1).all(), "a maximum below the mean"
    return found


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Entries of the counted records without assignments, which no mean includes.

    Attributes:
        entries: number of them, by record, layer, group and micro-batch; not those of a micro-batch that a record with
            fewer micro-batches than others does not have.
        of: number of all entries.
        layers: layers that have none in any counted record.
        iterations: iterations of records that have none in any layer.
    """

    entries: int
    of: int
    layers: tuple[int, ...]
    iterations: tuple[int, ...]


def left_out(trace: RoutingTrace, setup: SimulationSetup) -> LeftOut:
    """What `replay` and `lower_bounds` leave out."""
    entries, of = 0, 0
    filled_NL = np.zeros((trace.num_records - setup.warmup, trace.num_layers), dtype=np.bool_)
    for at in range(len(filled_NL)):
        counts_LGMRE = trace.groups(setup.num_ranks, setup.warmup + at)
        has_LGM = counts_LGMRE.any(axis=(-2, -1))
        has_LGM = has_LGM[:, :, : max(1, trace.num_micro_batches(setup.warmup + at))]
        filled_NL[at] = has_LGM.any(axis=(1, 2))
        entries += int((~has_LGM).sum())
        of += has_LGM.size
    return LeftOut(
        entries=entries,
        of=of,
        layers=tuple(trace.layer[~filled_NL.any(axis=0)].tolist()),
        iterations=tuple(trace.iteration[setup.warmup :][~filled_NL.any(axis=1)].tolist()),
    )
