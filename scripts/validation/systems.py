"""A measured run's step by the planner's model, with what its system's code adds to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from megatron_smartmoe.cost.moe_layer import APART_EXCHANGES, LayerConstants, LayerCounts
from megatron_smartmoe.cost.step.constants import StepConstants, expert_shape, layer_constants, spec_nodes
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.spec.cluster import ClusterSpec
from scripts.validation.measured import MeasuredRun, Part
from scripts.validation.routed import PADDED, GateLaw, counts_of

SHARED_CARD = True  # the GPUs of a node share its network card
# Seconds that SmartMoE's online placement spends on each assignment of a layer and micro-batch: it copies them to the
# host and remaps them one by one in Python. Measured on one CPU core: 2 to 4 ms for 8,192.
REMAP_S = 3e-3 / 8192
# Image runs keep fp32 parameters and let autocast choose. A LayerNorm returns fp32, so tokens are exchanged in it. The
# products of FastMoE's experts, which autocast does not know, are fp32 as well; Tutel's are ordinary ones.
FP32_TIMES = 8.0  # V100 datasheet: 112 TFLOPS of fp16 on tensor cores, 14 of fp32
FP32_SHARE = 0.8  # of that peak, which is easier to reach; an estimate


def predict(
    run: MeasuredRun,
    cluster: ClusterSpec,
    constants: StepConstants,
    gates: Mapping[str, GateLaw],
    system: Mapping[str, float],
) -> StepTime:
    """The run's step on `cluster` with these constants; `system` holds those of the systems' code."""
    once = replace(constants, step_s=0.0)  # clipping, logging and data come once a step
    times = [
        _part(run, part, cluster, once if at else constants, gates[run.gate], system)
        for at, part in enumerate(run.parts)
    ]
    terms = {term.name: sum(getattr(time, term.name) for time in times) for term in fields(StepTime)}
    if run.vision:
        terms["optimizer_s"] += run.samples * system["read_image"]
    return StepTime(**terms)


def _part(
    run: MeasuredRun,
    part: Part,
    cluster: ClusterSpec,
    constants: StepConstants,
    gate: GateLaw,
    system: Mapping[str, float],
) -> StepTime:
    """The step of layers of one width."""
    # Step 1: constants of the layer, as the system's exchanges and its loop over experts have them.
    padded = run.system in PADDED
    if padded:
        constants = replace(
            constants,
            all_to_all_intra=constants.all_to_all_intra * system["even_exchange"],
            all_to_all_inter=constants.all_to_all_inter * system["even_exchange"],
        )
    layer = _layer(run, part, cluster, constants)
    if not padded:
        layer = replace(layer, expert_s=layer.expert_s + system["expert_round"])
    # Step 2: each layer under its own load, and what the system adds to all of them.
    counts_L = counts_of(run, part, gate, spec_nodes(cluster, part.spec.ep))
    moe_L = [moe_times([counts], layer, part.model, part.spec, cluster, constants) for counts in counts_L]
    extra_s = _added_s(run, part, counts_L, cluster, constants, system)
    moe_L = [replace(one, layer=replace(one.layer, source_s=one.layer.source_s + extra_s)) for one in moe_L]
    # Step 3: shadowed experts travel in every micro-batch.
    if run.shadow:
        replica_s = _broadcast_s(part, cluster, constants) / system["broadcast"]
        moe_L = [
            replace(one, replicas_s=max(counts.returned.intra, counts.returned.inter_gpu) * replica_s)
            for one, counts in zip(moe_L, counts_L, strict=True)
        ]
    return step_time(part.model, part.spec, cluster, constants, moe_L)


def _layer(run: MeasuredRun, part: Part, cluster: ClusterSpec, constants: StepConstants) -> LayerConstants:
    """Constants of the layer in the run's types."""
    spec = part.spec
    if run.vision:
        spec = replace(spec, precision="fp32")
        if run.system not in PADDED:
            cluster = replace(cluster, gpu=replace(cluster.gpu, peak_flops=cluster.gpu.peak_flops / FP32_TIMES))
            constants = replace(constants, gemm=FP32_SHARE)
    # The constants were chosen with six collectives a layer, whatever each system has.
    return layer_constants(cluster, part.model, spec, constants, shared_card=SHARED_CARD, exchanges=APART_EXCHANGES)


def _added_s(
    run: MeasuredRun,
    part: Part,
    counts_L: list[LayerCounts],
    cluster: ClusterSpec,
    constants: StepConstants,
    system: Mapping[str, float],
) -> float:
    """Seconds of a layer and micro-batch that the planner's own layers do not have."""
    added_s = system["padded_layer"] if run.system in PADDED else 0.0
    if run.system == "deepspeed":
        added_s += _einsum_s(part, counts_L, cluster, constants)
    if run.dynamic:
        added_s += REMAP_S * part.spec.micro_batch * part.model.seq_length * part.model.moe.top_k
    return added_s


def _broadcast_s(part: Part, cluster: ClusterSpec, constants: StepConstants) -> float:
    """One shadowed expert: its weights broadcast, its gradient reduced, at the rate of a collective.

    Nothing hides them: both wait on the stream of the exchanges, before the exchange back.
    """
    expert = expert_shape(part.model, part.spec)
    bandwidth = cluster.intra_node.bandwidth_bytes_s
    if part.spec.ep > cluster.gpus_per_node:
        cards = cluster.gpus_per_node * cluster.inter_node.bandwidth_bytes_s * constants.ring_inter
        bandwidth = min(bandwidth, cards)
    return 2 * expert.weight_bytes / bandwidth


def _einsum_s(part: Part, counts_L: list[LayerCounts], cluster: ClusterSpec, constants: StepConstants) -> float:
    """Dispatch and combine as products with a one-hot [tokens, experts, capacity], forward and backward.

    Each is 2 x tokens x (experts x capacity) x H operations; a rank's padded rows are as many as it computes.
    """
    tokens = part.spec.micro_batch * part.model.seq_length
    busiest = sum(float(counts.tokens_R.max()) for counts in counts_L) / len(counts_L)
    flops = 5 * 2.0 * tokens * busiest * part.model.hidden
    return flops / (cluster.gpu.peak_flops * constants.gemm)
