"""What the cost model says of each variant: predicted seconds of a layer, from the functions that `simulate` calls."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from megatron_smartmoe.cli.simulate_prices import Prices
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.placement.layer_cost import PricedLayer
from megatron_smartmoe.placement.online_options import OnlineOptions, ReplicaMode
from megatron_smartmoe.runtime.replay import scaled_counts
from megatron_smartmoe.simulate.baselines.contiguous import Contiguous
from megatron_smartmoe.simulate.policies import OnlinePolicy, RulePolicy, SimulatedPolicy
from megatron_smartmoe.simulate.run import SimulationSetup, even_load_s, replay
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace
from scripts.training_bench.peers import PEERS, rule_of
from scripts.training_bench.variants import HOMES_INTERVAL, Shape


def as_routed(trace: RoutingTrace, ranks: int, shape: Shape) -> RoutingTrace:
    """The counts that the replay in training makes of a trace: scaled to a rank's tokens, in the model's layers."""
    counts_NLRE = np.stack([trace.groups(ranks, record)[:, 0, 0] for record in range(trace.num_records)])
    layers = [layer % counts_NLRE.shape[1] for layer in range(shape.layers)]
    scaled = np.apply_along_axis(scaled_counts, 3, counts_NLRE[:, layers], shape.tokens, shape.top_k)
    return RoutingTrace(
        counts=scaled.astype(np.uint32),
        iteration=trace.iteration,
        layer=np.arange(shape.layers),
        meta={**trace.meta, "source_ranks": ranks},
    )


def layer_seconds_of(
    trace: RoutingTrace, ranks: int, shape: Shape, variants: list[str], warmup: int, cluster: Path
) -> dict[str, float]:
    """Predicted seconds of a layer and micro-batch by variant; `trace` as it is routed."""
    prices = Prices(
        cluster=load_cluster_spec(cluster),
        expert=ExpertShape(hidden=shape.hidden, ffn=shape.ffn, element_bytes=4),
        num_ranks=ranks,
        num_nodes=1,
        micro_batches=shape.micro_batches,
        margin=0.0,
    )
    setup = SimulationSetup(
        num_ranks=ranks,
        spare_slots=1,
        warmup=warmup,
        constants=prices.layer("exact").constants,
        state_bytes=0,
        prices={"history": prices.layer("history"), "exact": prices.layer("exact")},
    )
    start = Placement.contiguous(num_layers=shape.layers, num_experts=shape.experts, num_ranks=ranks, spare_slots=1)

    def policy(variant: str) -> SimulatedPolicy:
        if variant in ("stock", "off"):
            return RulePolicy(Contiguous(), start, 1, 1, 1)
        if variant in PEERS:
            rule = rule_of(variant, prices.cluster, hidden=shape.hidden, ffn=shape.ffn)
            return RulePolicy(rule, start, 1, 1, HOMES_INTERVAL)
        mode = cast(ReplicaMode, variant)
        options = OnlineOptions(homes_interval=0, replicas=mode, micro_batches=shape.micro_batches)
        return OnlinePolicy(start, 1, options, PricedLayer(pricing=setup.pricing_of("history")))

    seconds = {"ideal": float(even_load_s(trace, setup).mean())}
    for variant in variants:
        if variant != "ideal":
            seconds[variant] = replay(trace, policy(variant), setup).total_s
    return seconds
