"""Online placement over a recorded trace: a step's MoE layers at several intervals between evaluations of the homes.

`smartmoe2023` is the paper's rule (the most popular expert first, each to the least loaded rank with a free slot,
whatever the move costs); ours moves homes when that saves more than it costs. Both plan from the records before, and
pay for what they move. Neither has replicas here: those are compared with other rules in docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import SimulationSetup, even_load_s, replay
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace

INTERVALS = (10, 50, 100, 500)
PAPER, OURS, STATIC, EVEN = "smartmoe2023", "homes", "static", "even load"


@dataclass(frozen=True, kw_only=True)
class Online:
    """Predicted seconds of the recorded MoE layers, by policy and interval (0 where there is none).

    Attributes:
        iteration: of each record, `[N]`.
        layer: number of each recorded layer, `[L]`.
        seconds: (policy, interval) -> forward and backward of each layer, the slower group, moves included, `[N, L]`.
    """

    iteration: IntArray
    layer: IntArray
    seconds: dict[tuple[str, int], FloatArray]

    def speedup(self, key: tuple[str, int], layer: int | None = None, after: int = 0) -> float:
        """How many times as fast as static homes, all records from iteration `after` together; None: all layers."""
        counted = self.iteration >= after
        static, other = (self.seconds[one][counted] for one in ((STATIC, 0), key))
        if layer is not None:
            at = int(np.flatnonzero(self.layer == layer)[0])
            static, other = static[:, at], other[:, at]
        return float(static.sum() / other.sum())


def online(trace: RoutingTrace, num_ranks: int, cluster: ClusterSpec, expert: ExpertShape) -> Online:
    """Replay the trace with every policy and interval; no record is left out as warm-up."""
    prices = Prices(
        cluster=cluster,
        expert=expert,
        num_ranks=num_ranks,
        num_nodes=max(1, num_ranks // cluster.gpus_per_node),
        micro_batches=trace.counts.shape[3] if trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(trace, num_ranks),
    )
    setup, groups = setup_of(prices, spare_slots=0, warmup=0), trace.num_sources // num_ranks
    start = Placement.contiguous(num_layers=trace.num_layers, num_experts=trace.num_experts, num_ranks=num_ranks)
    seconds: dict[tuple[str, int], FloatArray] = {}
    for name, interval in [(STATIC, 0), *((name, interval) for name in (PAPER, OURS) for interval in INTERVALS)]:
        policy: SimulatedPolicy = (
            peer_policy(PAPER, start, groups, setup, interval=interval)
            if name == PAPER
            else own_policy("auto", start, groups, setup, prices, homes_interval=interval)
        )
        seconds[name, interval] = _by_layer(trace, policy, setup)
    even_N = even_load_s(trace, setup)
    seconds[EVEN, 0] = even_N.reshape(trace.num_records, trace.num_layers, groups, -1).max(axis=2).sum(axis=-1)
    return Online(iteration=trace.iteration, layer=trace.layer, seconds=seconds)


def _by_layer(trace: RoutingTrace, policy: SimulatedPolicy, setup: SimulationSetup) -> FloatArray:
    """Seconds `[N, L]`: the slower group, all micro-batches together, this step's share of the moves included."""
    result = replay(trace, policy, setup)
    groups = trace.num_sources // setup.num_ranks
    together = (result.layer_s + result.moving_s).reshape(trace.num_records, trace.num_layers, groups, -1)
    return np.asarray(together.sum(axis=-1).max(axis=-1))
