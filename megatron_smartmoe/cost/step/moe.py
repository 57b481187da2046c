"""The MoE layer inside a step: the layer model's terms, averaged over layers and records of a load, for one launch.

`moe_layer.layer_time` prices every flow; here is only what a launch adds to it: expert tensor parallelism gathers the
busiest rank's tokens over its ETP group, its way of planning replicas decides how often they travel, an all-to-all in
chunks reads the experts' weights once more for each further chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_smartmoe.cost.dispatchers import Dispatcher, DispatcherName
from megatron_smartmoe.cost.moe_layer import (
    ALL_TO_ALLS,
    APART_EXCHANGES,
    LayerConstants,
    LayerCounts,
    LayerFlow,
    LayerTime,
    layer_time,
    on_the_wire,
)
from megatron_smartmoe.cost.replicas import schedule_of
from megatron_smartmoe.cost.step.constants import StepConstants, expert_shape
from megatron_smartmoe.cost.step.groups import Group, ring_s
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import FLAT, ParallelSpec

# Kernels that each further chunk of the all-to-all adds: its collectives and its grouped GEMMs, forward and backward.
# An estimate, not measured.
LAUNCHES_PER_CHUNK = 24


@dataclass(frozen=True)
class MoETimes:
    """One MoE layer of one micro-batch, forward and backward, in seconds.

    Attributes:
        layer: the layer model's terms, replicas left out.
        replicas_s: replica weights out and gradients back, as far as they are exposed, this micro-batch's share.
        expert_tensor_s: gathering and scattering over the ETP group.
        chunking_s: what the chunks of an overlapped all-to-all cost.
    """

    layer: LayerTime
    replicas_s: float
    expert_tensor_s: float
    chunking_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the layer without its replicas' traffic."""
        return self.layer.total_s + self.expert_tensor_s + self.chunking_s

    @property
    def with_replicas_s(self) -> float:
        """Seconds of the layer, this micro-batch's share of its replicas' traffic included."""
        return self.total_s + self.replicas_s


def moe_times(
    flows: Sequence[LayerFlow | LayerCounts],
    layer: LayerConstants,
    model: ModelSpec,
    spec: ParallelSpec,
    cluster: ClusterSpec,
    constants: StepConstants,
    micro_batches: int | None = None,
    dispatcher: Dispatcher | None = None,
) -> MoETimes:
    """Mean over `flows`, each the layer under one record of the load at this launch's tokens per rank.

    `micro_batches` of an iteration are those of the launch; a run whose batch grows names its own. `dispatcher` is the
    launch's, one of the two that are planned, unless a run has another.
    """
    shared = cluster.gpu.ranks_per_device
    schedule, kept = (
        schedule_of(
            one.replicas,
            expert_shape(model, one),
            micro_batches=micro_batches or spec.micro_batches,
            fetched_early=not spec.overlap_param_gather,
        )
        for one in (spec, replace(spec, replicas="history"))
    )
    levels = [level.ranks for level in layer.levels]
    sender = dispatcher or dispatcher_of(model, spec)
    counted = [
        flow if isinstance(flow, LayerCounts) else LayerCounts.of(on_the_wire(flow, sender), levels) for flow in flows
    ]
    times = [
        layer_time(
            counts,
            layer,
            all_to_all_chunks=spec.overlap_degree,
            ranks_per_device=shared,
            replicas=schedule,
            kept=kept,
            dispatcher=sender,
        )
        for counts in counted
    ]
    mean = {f.name: sum(getattr(time, f.name) for time in times) / len(times) for f in fields(LayerTime)}
    replicas_s = mean["replicas_s"] + mean["replicas_hidden_s"]
    mean["replicas_s"] = mean["replicas_hidden_s"] = 0.0
    busiest = sum(float(counts.tokens_R.max()) for counts in counted) / len(counted)
    gathered = busiest * spec.etp * model.hidden * spec.element_bytes
    tensor_group = Group(spec.etp, 1)
    tensor_s = ALL_TO_ALLS * ring_s(gathered, tensor_group, cluster, constants)
    tensor_s += (APART_EXCHANGES - ALL_TO_ALLS) * ring_s(1.0, tensor_group, cluster, constants)  # the weights
    per_chunk_s = mean["experts_s"] + LAUNCHES_PER_CHUNK * constants.launch_s
    return MoETimes(LayerTime(**mean), replicas_s, tensor_s, (spec.overlap_degree - 1) * per_chunk_s)


def dispatcher_of(model: ModelSpec, spec: ParallelSpec) -> Dispatcher:
    """What sends the tokens of a launch."""
    name: DispatcherName = "alltoall" if spec.dispatch == FLAT else "hierarchical"
    return Dispatcher(name=name, experts=model.moe.experts, top_k=model.moe.top_k)


def forward_again_s(times: MoETimes) -> float:
    """What recomputing the layer in the backward pass adds: a third of the arithmetic, half of everything else."""
    layer = times.layer
    arithmetic_s = (layer.gemm_s + layer.experts_s) / 3  # backward is twice forward
    moved_s = (layer.source_s + layer.fixed_s + layer.all_to_all_intra_s + layer.all_to_all_inter_s) / 2
    return arithmetic_s + moved_s + (times.expert_tensor_s + layer.hidden_s + times.chunking_s) / 2
