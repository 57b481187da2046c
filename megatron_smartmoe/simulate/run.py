"""The replay: for every record, plan from the records before it, evaluate on it, then let the policy observe it.

Imbalance is the largest rank load over the mean, per layer, expert-parallel group and micro-batch; all
ranks wait for the slowest one. The lower bound beside it is what no placement with these slots could beat. Where there
are no assignments (a dense layer in the record of a whole model, a pass without tokens) there is no mean: such entries
are left out of everything, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.layer_cost import LayerPricing, price_layer
from megatron_smartmoe.simulate.policies import SimulatedPolicy, Stats
from megatron_smartmoe.spec.arrays import FloatArray
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
    """

    num_ranks: int
    spare_slots: int = 0
    num_nodes: int = 1
    warmup: int = 25
    constants: LayerConstants
    state_bytes: int

    @property
    def pricing(self) -> LayerPricing:
        """The part of it that prices a layer of one group."""
        return LayerPricing(num_ranks=self.num_ranks, num_nodes=self.num_nodes, constants=self.constants)


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """One policy over the counted records; `imbalance` has one value per record, layer, group and micro-batch."""

    name: str
    imbalance: FloatArray
    layer_s: FloatArray
    stats: Stats
    decisions: list[Decision]


def replay(
    trace: RoutingTrace, policy: SimulatedPolicy, setup: SimulationSetup, records: Iterable[int] | None = None
) -> PolicyResult:
    """Replay a trace through one policy.

    Args:
        trace: routing counts, record by record.
        policy: a policy that has observed nothing yet.
        setup: ranks, slots and prices.
        records: numbers of the records in order, wrapped to show progress; None takes all of them.
    """
    imbalance: list[float] = []
    layer_s: list[float] = []
    for record in range(trace.num_records) if records is None else records:
        if record == setup.warmup:
            policy.stats = Stats()
        counts_LGMRE = trace.groups(setup.num_ranks, record)
        # Step 1: plan from the records before this one.
        policy.before(int(trace.iteration[record]))
        # Step 2: apply the plan to every micro-batch; exact rules plan here, from its counts.
        for layer, group, micro in np.ndindex(*counts_LGMRE.shape[:3]):
            counts_RE = counts_LGMRE[layer, group, micro]
            if not counts_RE.any():
                continue
            plan = policy.plan(layer, group, counts_RE)
            if record >= setup.warmup:
                seconds, worst = price_layer(plan, counts_RE, policy.homes(layer), setup.pricing)
                layer_s.append(seconds)
                imbalance.append(worst)
        # Step 3: observe the record.
        policy.observe(counts_LGMRE)
    return PolicyResult(
        name=policy.name,
        imbalance=np.array(imbalance),
        layer_s=np.array(layer_s),
        stats=policy.stats,
        decisions=policy.decisions,
    )


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
