"""The space of launches, point by point; a point that breaks one of Megatron's rules keeps the rule as its reason.

A *shape* is what decides how the model is distributed: TP, PP, VPP, EP, ETP, CP and the micro-batch. Recomputation,
spare slots and the overlap degree are chosen per shape by the search. Sizes are divisors of what they divide: others
break a rule anyway. Limits that are not rules (tensor parallelism stays inside a node) are in `SpaceOptions` and give
reasons too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import (
    DISPATCHES,
    FLAT,
    HIERARCHICAL,
    Dispatch,
    Implementation,
    ParallelSpec,
    Precision,
    Recompute,
    violation,
)

RECOMPUTE: tuple[Recompute, ...] = ("none", "act", "moe", "full")  # by time


@dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """Limits of the space.

    Attributes:
        micro_batches: samples of a micro-batch to try.
        spare_slots: spare slots per rank to try.
        overlap_degrees: numbers of chunks of an all-to-all to try.
        dispatches: whether a token is sent once for each of its experts, or between nodes once for each node.
        recompute: modes to try, in the order of their step time.
        max_virtual: largest number of model chunks per stage.
        min_sequence: fewest tokens of a sequence that context parallelism may leave to a rank.
        homes_interval: expert placement is re-evaluated every so many iterations; 0 plans without moving experts.
        precision: of weights and activations.
        implementation: whose layers Megatron uses.
        fixed: sizes that are given (`tp`, `pp`, `vpp`, `ep`, `etp`, `cp`); nothing else is tried for them.
        layers_of_chunk: layers of each model chunk where they are given; needs fixed `pp` and `vpp`.
        distributed_optimizer: whether every launch shards its optimizer state.
        overlap_grad_reduce: whether every launch overlaps its gradient reduction.
        overlap_param_gather: whether every launch overlaps its parameter all-gather.
        grad_reduce_in_fp32: whether every launch reduces gradients in fp32.
        expert_parallel: True for EP > 1 only, False for EP 1 only, None for both.
        ffn_multiple: an expert's inner size on a rank must be a multiple of this, for the kernels that will run.
    """

    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    spare_slots: tuple[int, ...] = (0, 1, 2)
    overlap_degrees: tuple[int, ...] = (1, 2, 4)
    dispatches: tuple[Dispatch, ...] = DISPATCHES
    recompute: tuple[Recompute, ...] = RECOMPUTE
    max_virtual: int = 8
    min_sequence: int = 2048
    homes_interval: int = 100
    precision: Precision = "bf16"
    implementation: Implementation = "transformer_engine"
    fixed: Mapping[str, int] = field(default_factory=dict)
    layers_of_chunk: tuple[int, ...] | None = None
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    grad_reduce_in_fp32: bool = True
    expert_parallel: bool | None = None
    ffn_multiple: int = 1


@dataclass(frozen=True)
class Rejected:
    """An excluded point and its reason; where memory is the reason, also the bytes that it needs at least."""

    spec: ParallelSpec
    reason: str
    needs_bytes: float | None = None


def shapes(
    model: ModelSpec, cluster: ClusterSpec, gpus: int, options: SpaceOptions
) -> Iterator[ParallelSpec | Rejected]:
    """Every shape of the space: a launch that Megatron accepts, or a rejected point."""
    for spec in _points(model, cluster, gpus, options):
        reason = exclusion(model, cluster, spec, options)
        yield Rejected(spec, reason) if reason else spec


def exclusion(model: ModelSpec, cluster: ClusterSpec, spec: ParallelSpec, options: SpaceOptions) -> str | None:
    """The first rule or limit that excludes a launch, or None; the search checks memory."""
    return violation(model, spec) or _limit(spec, cluster) or _unsupported(model, cluster, spec, options)


def _points(model: ModelSpec, cluster: ClusterSpec, gpus: int, options: SpaceOptions) -> Iterator[ParallelSpec]:
    tensor = [size for size in divisors(gpus) if size <= cluster.gpus_per_node and model.heads % size == 0]
    context = [size for size in divisors(gpus) if model.seq_length // size >= options.min_sequence or size == 1]
    for pp in _given(options, "pp", [size for size in divisors(gpus) if size <= model.layers]):
        expert = [size for size in divisors(model.moe.experts) if gpus % (pp * size) == 0]
        for vpp, layout in _splits(model, pp, options):
            for tp in _given(options, "tp", tensor):
                for cp in _given(options, "cp", context):
                    for ep in _given(options, "ep", expert):
                        for etp in _given(options, "etp", sorted({1, tp})):
                            for micro_batch in options.micro_batches:
                                yield ParallelSpec(
                                    gpus=gpus,
                                    tp=tp,
                                    pp=pp,
                                    vpp=vpp,
                                    layers_of_chunk=layout,
                                    ep=ep,
                                    etp=etp,
                                    cp=cp,
                                    micro_batch=micro_batch,
                                    global_batch=model.global_batch,
                                    homes_interval=options.homes_interval if ep > 1 else 0,
                                    precision=options.precision,
                                    implementation=options.implementation,
                                    distributed_optimizer=options.distributed_optimizer,
                                    overlap_grad_reduce=options.overlap_grad_reduce,
                                    overlap_param_gather=options.overlap_param_gather,
                                    grad_reduce_in_fp32=options.grad_reduce_in_fp32,
                                )


def _given(options: SpaceOptions, name: str, sizes: list[int]) -> list[int]:
    """The size that is given, even if it breaks a rule (the rule is then the reason); else `sizes`."""
    return [options.fixed[name]] if name in options.fixed else sizes


def _splits(model: ModelSpec, pp: int, options: SpaceOptions) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """(VPP, layout): even splits, and an uneven one where the layers do not divide or the end is heavy."""
    if options.layers_of_chunk is not None:
        yield options.fixed["vpp"], options.layers_of_chunk
        return
    for vpp in _given(options, "vpp", list(range(1, options.max_virtual + 1 if pp > 1 else 2))):
        total = pp * vpp
        if total > model.layers and "vpp" not in options.fixed:
            return
        if model.layers % total == 0 or "vpp" in options.fixed:
            yield vpp, None
        by_number = vpp > 1 and "vpp" in options.fixed  # Megatron takes the number or a layout, not both
        if pp > 1 and (model.layers % total or model.mtp_layers) and vpp <= 2 and not by_number:
            layout = uneven_layout(model, total)
            if layout is not None:
                yield vpp, layout


def uneven_layout(model: ModelSpec, total: int) -> tuple[int, ...] | None:
    """Layers per chunk with a light last one: the loss counts as a layer's worth, each prediction block as two."""
    extra = 1 + 2 * model.mtp_layers
    target = (model.layers + extra) / total
    last = max(1, round(target - extra))
    rest, chunks = model.layers - last, total - 1
    if rest < chunks:
        return None
    small, more = divmod(rest, chunks)
    # What does not divide goes to the chunks after the first, whose stage has the embedding.
    return (*(small + (chunks - more <= at) for at in range(chunks)), last)


def _limit(spec: ParallelSpec, cluster: ClusterSpec) -> str | None:
    """Layouts that Megatron accepts and that lie badly on the nodes."""
    per_node, group = cluster.gpus_per_node, spec.ep * spec.etp
    if group > per_node and group % per_node:
        return f"EP x ETP = {group} ranks do not fill whole nodes of {per_node}"
    if group > per_node and per_node % spec.etp:
        return f"ETP {spec.etp} does not fit evenly into a node of {per_node}"
    return None


def _unsupported(model: ModelSpec, cluster: ClusterSpec, spec: ParallelSpec, options: SpaceOptions) -> str | None:
    """What a checkpoint or the layers that will run do not support."""
    if options.expert_parallel is not None and options.expert_parallel != (spec.ep > 1):
        return "the checkpoint needs EP > 1" if options.expert_parallel else "the checkpoint needs EP 1"
    if not spare_slots(model, spec, options) or not overlap_degrees(model, spec, options):
        return f"EP {spec.ep} is too small for these spare slots or overlap degrees, or the model does not allow them"
    if not exchanges(model, cluster, spec, options):
        return (
            f"EP {spec.ep} lies on one node, where no dispatch can be hierarchical, or no overlap degree of 1 is left"
        )
    if model.moe.ffn // spec.etp % options.ffn_multiple:
        return f"ETP {spec.etp} leaves a rank an inner size that is no multiple of {options.ffn_multiple}"
    return None


def spare_slots(model: ModelSpec, spec: ParallelSpec, options: SpaceOptions) -> tuple[int, ...]:
    """The numbers of spare slots to try for a launch: no rank needs more replicas than other ranks have experts.

    Experts that drop tokens get none: the predicted load has nothing dropped.
    """
    others = model.moe.experts - model.moe.experts // spec.ep
    if model.moe.capacity_factor:
        others = 0
    return tuple(slots for slots in options.spare_slots if slots <= others)


def overlap_degrees(model: ModelSpec, spec: ParallelSpec, options: SpaceOptions) -> tuple[int, ...]:
    """The overlap degrees to try for a launch: an all-to-all among EP ranks has at most EP chunks."""
    return tuple(degree for degree in options.overlap_degrees if degree <= spec.ep)


def exchanges(
    model: ModelSpec, cluster: ClusterSpec, spec: ParallelSpec, options: SpaceOptions
) -> tuple[tuple[int, Dispatch], ...]:
    """The overlap degrees and dispatches to try for a launch: a hierarchical one has one chunk, and nodes to cross."""
    degrees = overlap_degrees(model, spec, options)
    flat = tuple((degree, FLAT) for degree in degrees if FLAT in options.dispatches)
    crosses = spec.ep * spec.etp > cluster.gpus_per_node and spec.ep > 1
    hierarchical = HIERARCHICAL in options.dispatches and crosses and 1 in degrees
    return (*flat, (1, HIERARCHICAL)) if hierarchical else flat


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
