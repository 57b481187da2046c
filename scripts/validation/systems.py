"""A measured run's step by the planner's model, with what its system's code adds to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, expert_shape, layer_constants, spec_nodes
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.spec.cluster import ClusterSpec
from scripts.validation.measured import MeasuredRun, Part
from scripts.validation.routed import PADDED, GateLaw, flows_of

SHARED_CARD = True  # the GPUs of a node share its network card


def predict(
    run: MeasuredRun,
    cluster: ClusterSpec,
    constants: StepConstants,
    gates: Mapping[str, GateLaw],
    system_s: Mapping[str, float],
) -> StepTime:
    """The run's step on `cluster` with these constants."""
    once = replace(constants, step_s=0.0)  # clipping, logging and data come once a step
    times = [
        _part(run, part, cluster, constants if at == 0 else once, gates, system_s) for at, part in enumerate(run.parts)
    ]
    return StepTime(**{term.name: sum(getattr(time, term.name) for time in times) for term in fields(StepTime)})


def _part(
    run: MeasuredRun,
    part: Part,
    cluster: ClusterSpec,
    constants: StepConstants,
    gates: Mapping[str, GateLaw],
    system_s: Mapping[str, float],
) -> StepTime:
    flows_L = flows_of(run, part, gates[run.gate], spec_nodes(cluster, part.spec.ep))
    if run.system in PADDED:
        even = system_s["even_exchange"]
        constants = replace(
            constants,
            all_to_all_intra=constants.all_to_all_intra * even,
            all_to_all_inter=constants.all_to_all_inter * even,
        )
    layer = layer_constants(cluster, part.model, part.spec, constants, shared_card=SHARED_CARD)
    if run.system not in PADDED:
        layer = replace(layer, expert_s=layer.expert_s + system_s["expert_round"])
    moe = [moe_times([flow], layer, part.model, part.spec, cluster, constants) for flow in flows_L]
    if run.system in PADDED:
        extra_s = system_s["padded_layer"] + (_einsum_s(part, flows_L, cluster, constants) if run.system == "deepspeed" else 0.0)
        moe = [replace(one, layer=replace(one.layer, source_s=one.layer.source_s + extra_s)) for one in moe]
    if run.shadow:
        replica_s = _broadcast_s(part, cluster, constants, system_s["broadcast"])
        moe = [
            replace(one, replicas_s=float(flow.replicas_RR.sum(axis=1).max()) * replica_s)
            for one, flow in zip(moe, flows_L, strict=True)
        ]
    return step_time(part.model, part.spec, cluster, constants, moe)


def _broadcast_s(part: Part, cluster: ClusterSpec, constants: StepConstants, share: float) -> float:
    """One shadowed expert in every micro-batch: its weights broadcast, its gradient reduced, nothing hidden.

    Both wait on the stream of the exchanges, before the exchange back.
    """
    expert = expert_shape(part.model, part.spec)
    bandwidth = cluster.intra_node.bandwidth_bytes_s
    if part.spec.ep > cluster.gpus_per_node:
        cards = cluster.gpus_per_node * cluster.inter_node.bandwidth_bytes_s * constants.ring_inter
        bandwidth = min(bandwidth, cards)
    return 2 * expert.weight_bytes / (bandwidth * share)


def _einsum_s(part: Part, flows_L: list[LayerFlow], cluster: ClusterSpec, constants: StepConstants) -> float:
    """Dispatch and combine as products with a one-hot [tokens, experts, capacity], forward and backward.

    Each is 2 x tokens x (experts x capacity) x H operations; a rank's padded rows are as many as it computes.
    """
    tokens = part.spec.micro_batch * part.model.seq_length
    busiest = sum(float(flow.load_ER.sum(axis=0).max()) for flow in flows_L) / len(flows_L)
    flops = 5 * 2.0 * tokens * busiest * part.model.hidden
    return flops / (cluster.gpu.peak_flops * constants.gemm)
