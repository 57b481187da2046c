"""The report of a routing trace: what balancing would have given a run that had none, by the simulator."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import DEFAULT_CLUSTER, Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.report.run_record import Balance, RunRecord
from megatron_smartmoe.simulate.policies import SimulatedPolicy
from megatron_smartmoe.simulate.run import PolicyResult, even_load_s, replay
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import load_trace

_HOMES_INTERVAL = 100  # iterations, as training
_HIDDEN, _FFN = 4096, 1536


def simulated_run(path: Path, *, ep: int, spare_slots: int, cluster: Path | None) -> RunRecord:
    """A trace as a run: balance without and with `auto`, its decisions, and predicted times.

    Args:
        path: of the trace.
        ep: ranks of an expert-parallel group.
        spare_slots: K per rank.
        cluster: the machine for predicted times and prices; None for H100 with 8 per node.

    Raises:
        ConfigError: the trace cannot be read, or its experts or sources cannot be shared by the ranks.
    """
    trace = load_trace(path, field="RUN")
    if trace.num_experts % ep:
        way_out = f"Every rank has as many experts: --ep {math.gcd(trace.num_experts, ep)}."
        raise ConfigError("--ep", ep, f"must divide the trace's {trace.num_experts} experts", way_out)
    spec = load_cluster_spec(cluster) if cluster is not None else DEFAULT_CLUSTER
    prices = Prices(
        cluster=spec,
        expert=ExpertShape(hidden=_HIDDEN, ffn=_FFN),
        num_ranks=ep,
        num_nodes=spec.nodes_of_group(ep) if cluster is not None else 1,
        micro_batches=trace.counts.shape[3] if trace.has_micro_batches else 1,
        rank_tokens=rank_tokens(trace, ep),
    )
    setup = setup_of(prices, spare_slots=spare_slots, warmup=min(25, trace.num_records // 5))
    placement = Placement.contiguous(
        num_layers=trace.num_layers, num_experts=trace.num_experts, num_ranks=ep, spare_slots=spare_slots
    )
    groups = max(1, trace.num_sources // ep)
    policies: list[SimulatedPolicy] = [
        peer_policy("none", placement, groups, setup, interval=1),
        own_policy("auto", placement, groups, setup, prices, homes_interval=_HOMES_INTERVAL),
    ]
    # Step 1: replay, once without balancing and once as training would run.
    without, balanced = (
        replay(trace, policy, setup, tqdm(range(trace.num_records), desc=policy.name, leave=False, disable=None))
        for policy in policies
    )
    even_ms = float(even_load_s(trace, setup).mean()) * 1e3
    # Step 2: as what a run directory holds.
    places = [
        (record, layer)
        for record in range(setup.warmup, trace.num_records)
        for layer, has_GM in enumerate(trace.groups(ep, record).any(axis=(-2, -1)))
        for has in has_GM.ravel()
        if has
    ]
    notes = [
        f"Simulated: what smartmoe simulate predicts for {ep} ranks with {spare_slots} spare "
        f"slot{'s' if spare_slots != 1 else ''} each, experts {_HIDDEN} x {_FFN}, on {spec.name}, after "
        f"{setup.warmup} records of warm-up",
        f"A layer and micro-batch without balancing: {_ms(without)}, {even_ms / _total_ms(without):.0%} of an even "
        f"load's speed ({even_ms:.3f} ms); with it: {_ms(balanced)}, {even_ms / _total_ms(balanced):.0%}",
        *trace.notes,
    ]
    return RunRecord(
        name=f"{path.name}, simulated",
        metrics={},
        balance=_balance(places, trace.iteration, trace.layer, without.imbalance, balanced.imbalance),
        decisions=[
            json.loads(decision.to_line()) for decision in balanced.decisions if decision.kind in ("homes", "review")
        ],
        num_replica_plans=sum(decision.kind == "replicas" for decision in balanced.decisions),
        placement=None,
        trace=trace,
        summary={"iterations": int(trace.iteration[-1])},
        environment={},
        arguments={"expert_model_parallel_size": str(ep)},
        config="",
        plan={},
        notes=notes,
        compared=("without balancing", "with smartmoe"),
    )


def _total_ms(result: PolicyResult) -> float:
    return result.total_s * 1e3


def _ms(result: PolicyResult) -> str:
    return f"{_total_ms(result):.3f} ms"


def _balance(
    places: Sequence[tuple[int, int]],
    iteration_N: IntArray,
    layer_L: IntArray,
    without: FloatArray,
    balanced: FloatArray,
) -> list[Balance]:
    """Max / mean tokens per rank by layer; of a record, the worst group and micro-batch.

    Args:
        places: record and row of the layer of each value, in the simulator's order.
        iteration_N: iteration of each record.
        layer_L: number of each layer.
        without: max / mean of homes in Megatron's order.
        balanced: with homes and replicas as planned.
    """
    place_P2 = np.array(places)
    found = []
    for row in np.unique(place_P2[:, 1]):
        of_layer = place_P2[:, 1] == row
        records, number_P = np.unique(place_P2[of_layer, 0], return_inverse=True)
        worst = np.ones((2, len(records)))
        for which, values in enumerate((without, balanced)):
            np.maximum.at(worst[which], number_P, values[of_layer])
        found.append(
            Balance(
                layer=int(layer_L[row]),
                iteration=iteration_N[records].astype(np.float64),
                homes=worst[0],
                split=worst[1],
                replicas=None,
            )
        )
    return found
