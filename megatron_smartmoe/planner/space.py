"""The space of launches, point by point; a point that breaks one of Megatron's rules keeps the rule as its reason.

A *shape* is what decides where the model lies: TP, PP, VPP, EP, ETP, CP and the micro-batch. Recomputation, spare
slots and the overlap degree are chosen per shape by the search. Sizes are divisors of what they divide: others break a
rule anyway. Limits that are not rules (tensor parallelism stays inside a node) are in `SpaceOptions` and give reasons
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import Implementation, ParallelSpec, Precision, violation


@dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """Limits of the space.

    Attributes:
        micro_batches: samples of a micro-batch that are tried.
        spare_slots: replica slots per rank that are tried.
        overlap_degrees: cuts of the all-to-all that are tried.
        max_virtual: chunks per stage.
        min_sequence: tokens of a sequence that context parallelism leaves to a rank.
        homes_interval: iterations between two looks at the homes; 0 plans without the slow loop.
        precision: of training.
        implementation: whose layers.
    """

    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    spare_slots: tuple[int, ...] = (0, 1, 2)
    overlap_degrees: tuple[int, ...] = (1, 2, 4)
    max_virtual: int = 8
    min_sequence: int = 2048
    homes_interval: int = 100
    precision: Precision = "bf16"
    implementation: Implementation = "transformer_engine"


@dataclass(frozen=True)
class Rejected:
    """A point that is out, and why."""

    spec: ParallelSpec
    reason: str


def shapes(
    model: ModelSpec, cluster: ClusterSpec, gpus: int, options: SpaceOptions
) -> Iterator[ParallelSpec | Rejected]:
    """Every shape of the space: a launch that Megatron accepts, or a rejected point."""
    for spec in _points(model, cluster, gpus, options):
        reason = violation(model, spec) or _limit(spec, cluster)
        yield Rejected(spec, reason) if reason else spec


def _points(model: ModelSpec, cluster: ClusterSpec, gpus: int, options: SpaceOptions) -> Iterator[ParallelSpec]:
    tensor = [size for size in divisors(gpus) if size <= cluster.gpus_per_node and model.heads % size == 0]
    context = [size for size in divisors(gpus) if model.seq_length // size >= options.min_sequence or size == 1]
    for pp in (size for size in divisors(gpus) if size <= model.layers):
        for vpp, layout in _splits(model, pp, options):
            for tp in tensor:
                for cp in context:
                    for ep in (size for size in divisors(model.moe.experts) if gpus % (pp * size) == 0):
                        for etp in sorted({1, tp}):
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
                                    homes_interval=options.homes_interval if ep > 1 and not model.mtp_layers else 0,
                                    precision=options.precision,
                                    implementation=options.implementation,
                                    grad_reduce_in_fp32=True,
                                )


def _splits(model: ModelSpec, pp: int, options: SpaceOptions) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """(VPP, layout): even splits, and an uneven one where the layers do not divide or the end is heavy."""
    for vpp in range(1, options.max_virtual + 1 if pp > 1 else 2):
        total = pp * vpp
        if total > model.layers:
            return
        if model.layers % total == 0:
            yield vpp, None
        if pp > 1 and (model.layers % total or model.mtp_layers) and vpp <= 2:
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
    """What Megatron would accept and nobody wants."""
    per_node, group = cluster.gpus_per_node, spec.ep * spec.etp
    if group > per_node and group % per_node:
        return f"EP x ETP = {group} ranks do not fill whole nodes of {per_node}"
    if group > per_node and per_node % spec.etp:
        return f"ETP {spec.etp} does not fit evenly into a node of {per_node}"
    return None


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
