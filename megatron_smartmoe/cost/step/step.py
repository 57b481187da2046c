"""Time of one training step under a load: every term in seconds of the step, their sum is the step.

Method. Each pipeline stage's micro-batch is the sum of its layers; the schedule makes a step of it (`pipeline`); what
follows the schedule, gradients, optimizer and parameters, is added as far as it is exposed. The terms are those of the
slowest stage, times the micro-batches; what that stage waits for the others is the bubble.

Alternatives: an event simulation of the schedule costs a thousand times more and differs by the order of sends; a
single formula (12 L H^2 over peak) cannot distinguish two plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.memory.buffers import MOMENT_BYTES, largest_state_bytes
from megatron_smartmoe.cost.step.constants import StepConstants
from megatron_smartmoe.cost.step.dense import (
    FORWARD_TENSOR_COLLECTIVES,
    PASSES,
    TENSOR_COLLECTIVES,
    DenseTimes,
    dense_times,
    tokens_of,
)
from megatron_smartmoe.cost.step.groups import Group, all_reduce_s, ring_s, send_s
from megatron_smartmoe.cost.step.moe import MoETimes, forward_again_s
from megatron_smartmoe.cost.step.pipeline import schedule_s
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, distinct_stages, pipeline_chunks

# Memory traffic of Adam, bytes per owned parameter: fp32 gradient, main weight and two moments read (16), the last
# three written (12), the model's weight written (at most 4).
OPTIMIZER_BYTES = 32
# Of overlapped gradients and parameters: the last bucket's reduction starts when the backward pass has ended, and the
# first bucket's gather ends before the forward pass starts. An estimate, not measured.
LEAST_EXPOSED_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The terms of a step's time; `total_s` is their sum, `hidden_s` is negative or zero."""

    attention_s: float = 0.0
    dense_mlp_s: float = 0.0
    shared_expert_s: float = 0.0
    moe_gemm_s: float = 0.0
    moe_experts_s: float = 0.0
    moe_source_s: float = 0.0
    moe_fixed_s: float = 0.0
    all_to_all_intra_s: float = 0.0
    all_to_all_inter_s: float = 0.0
    expert_tensor_s: float = 0.0
    hidden_s: float = 0.0
    replicas_s: float = 0.0
    tensor_comm_s: float = 0.0
    context_comm_s: float = 0.0
    recompute_s: float = 0.0
    loss_s: float = 0.0
    pipeline_comm_s: float = 0.0
    bubble_s: float = 0.0
    grad_sync_s: float = 0.0
    param_gather_s: float = 0.0
    optimizer_s: float = 0.0
    other_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, term.name) for term in fields(self)))

    def terms(self) -> list[tuple[str, float]]:
        """(what, seconds) of every term that is not zero, in order."""
        return [(LABELS[f.name], getattr(self, f.name)) for f in fields(self) if getattr(self, f.name)]


LABELS = {
    "attention_s": "attention",
    "dense_mlp_s": "dense MLP",
    "shared_expert_s": "shared expert",
    "moe_gemm_s": "experts: GEMM of the busiest rank's tokens",
    "moe_experts_s": "experts: weights through memory",
    "moe_source_s": "experts: router, permute",
    "moe_fixed_s": "experts: launches and latencies",
    "all_to_all_intra_s": "all-to-all inside nodes",
    "all_to_all_inter_s": "all-to-all between nodes",
    "expert_tensor_s": "expert tensor parallel gather",
    "hidden_s": "all-to-all hidden behind GEMMs",
    "replicas_s": "replica weights and gradients",
    "tensor_comm_s": "tensor and sequence parallel",
    "context_comm_s": "context parallel",
    "recompute_s": "recomputation",
    "loss_s": "embedding, loss, prediction blocks",
    "pipeline_comm_s": "sends between stages",
    "bubble_s": "pipeline bubble and uneven stages",
    "grad_sync_s": "exposed gradient reduction",
    "param_gather_s": "exposed parameter all-gather",
    "optimizer_s": "optimizer and per-step overhead",
    "other_s": "extra all-to-all chunks",
}


def step_time(
    model: ModelSpec, spec: ParallelSpec, cluster: ClusterSpec, constants: StepConstants, moe: Sequence[MoETimes]
) -> StepTime:
    """Seconds of one step of a launch.

    Args:
        model: what is trained.
        spec: the launch; it must not break Megatron's rules.
        cluster: machines and links.
        constants: shares of the peaks that are reached.
        moe: one MoE layer of one micro-batch under the load, from `moe_times`; several entries are equal parts of the
            model from first layer to last, so that a stage whose layers are hotter shows.
    """
    # Step 1: terms of one micro-batch on each stage, from the layers that the stage holds.
    held = _stages(model, spec.pp, spec.vpp, spec.layers_of_chunk, len(moe))
    terms_ST = _micro_batch(model, spec, cluster, constants, moe)
    # Step 2: the schedule. The slowest stage sets the pace, the others' share of one micro-batch is the bubble.
    micro_S = terms_ST.sum(axis=1).tolist()
    _, bubble_s, slowest = schedule_s(micro_S, spec.micro_batches, spec.vpp, cluster.gpu.ranks_per_device)
    # Step 3: replicas, outside the schedule because those from history move once a step.
    replicas_s = float(held.experts_SN[slowest] @ np.array([one.replicas_s for one in moe]))
    return StepTime(
        **dict(zip(_TERMS, (terms_ST[slowest] * spec.micro_batches).tolist(), strict=True)),
        replicas_s=replicas_s * spec.micro_batches,
        bubble_s=bubble_s,
        **_after(model, spec, cluster, constants, slowest, micro_S[slowest]),
    )


def least_step_s(
    model: ModelSpec, spec: ParallelSpec, cluster: ClusterSpec, constants: StepConstants, moe: MoETimes
) -> float:
    """Seconds that no step is below whose MoE layers all take at least as long as `moe`.

    Slower layers may make another stage the slowest, with less to reduce and to update: the least of any stage counts.
    """
    micro_S = _micro_batch(model, spec, cluster, constants, [moe]).sum(axis=1).tolist()
    total_s, _, slowest = schedule_s(micro_S, spec.micro_batches, spec.vpp, cluster.gpu.ranks_per_device)
    stages = distinct_stages(model, spec.pp, spec.vpp, spec.layers_of_chunk)
    after_s = (sum(_after(model, spec, cluster, constants, stage, micro_S[slowest]).values()) for stage in stages)
    return float(total_s + min(after_s))


def _micro_batch(
    model: ModelSpec, spec: ParallelSpec, cluster: ClusterSpec, constants: StepConstants, moe: Sequence[MoETimes]
) -> FloatArray:
    """Terms of one micro-batch on each stage, from the layers that the stage holds."""
    dense = dense_times(model, spec, cluster, constants)
    held = _stages(model, spec.pp, spec.vpp, spec.layers_of_chunk, len(moe))
    terms_ST = held.experts_SN @ np.array([_expert_layer(dense, one, spec) for one in moe])
    terms_ST += np.outer(held.layers_S, _any_layer(dense, spec)) + np.outer(held.dense_S, _dense_layer(dense, spec))
    terms_ST[:, _INDEX["loss_s"]] += held.losses_S * dense.loss_s + held.mtp_S * dense.mtp_extra_s
    terms_ST[:, _INDEX["pipeline_comm_s"]] += _sends(model, spec, cluster, constants)
    return np.asarray(terms_ST)


# Terms of a stage's micro-batch, in the order of the arrays below.
_TERMS = tuple(
    "attention_s dense_mlp_s shared_expert_s moe_gemm_s moe_experts_s moe_source_s moe_fixed_s all_to_all_intra_s "
    "all_to_all_inter_s expert_tensor_s hidden_s tensor_comm_s context_comm_s recompute_s loss_s pipeline_comm_s "
    "other_s".split()
)
_INDEX = {name: at for at, name in enumerate(_TERMS)}


def _vector(**values: float) -> FloatArray:
    found = np.zeros(len(_TERMS))
    for name, value in values.items():
        found[_INDEX[name]] = value
    return found


def _any_layer(dense: DenseTimes, spec: ParallelSpec) -> FloatArray:
    """Attention, which every layer has."""
    again_s = _forward_s(dense.attention_s, dense.tensor_comm_attention_s) if spec.recompute == "full" else 0.0
    return _vector(
        attention_s=dense.attention_s,
        tensor_comm_s=dense.tensor_comm_attention_s,
        context_comm_s=dense.context_comm_s,
        recompute_s=again_s,
    )


def _forward_s(arithmetic_s: float, tensor_comm_s: float) -> float:
    """The forward part of a block's seconds: what recomputing it in the backward pass adds."""
    return arithmetic_s / PASSES + FORWARD_TENSOR_COLLECTIVES / TENSOR_COLLECTIVES * tensor_comm_s


def _dense_layer(dense: DenseTimes, spec: ParallelSpec) -> FloatArray:
    """The MLP of a layer without experts."""
    again_s = _forward_s(dense.dense_mlp_s, dense.tensor_comm_mlp_s) if spec.recompute == "full" else 0.0
    return _vector(dense_mlp_s=dense.dense_mlp_s, tensor_comm_s=dense.tensor_comm_mlp_s, recompute_s=again_s)


def _expert_layer(dense: DenseTimes, moe: MoETimes, spec: ParallelSpec) -> FloatArray:
    """The experts, and the shared one, of a layer that has them."""
    layer = moe.layer
    again_s = forward_again_s(moe) + dense.shared_expert_s / PASSES if spec.recompute in ("moe", "full") else 0.0
    return _vector(
        shared_expert_s=dense.shared_expert_s,
        moe_gemm_s=layer.gemm_s,
        moe_experts_s=layer.experts_s,
        moe_source_s=layer.source_s,
        moe_fixed_s=layer.fixed_s,
        all_to_all_intra_s=layer.all_to_all_intra_s,
        all_to_all_inter_s=layer.all_to_all_inter_s,
        expert_tensor_s=moe.expert_tensor_s,
        hidden_s=layer.hidden_s,
        tensor_comm_s=dense.tensor_comm_mlp_s if dense.shared_expert_s else 0.0,
        recompute_s=again_s,
        other_s=moe.chunking_s,
    )


@dataclass(frozen=True)
class _Held:
    """What each stage holds: layers, layers without experts, losses, prediction blocks, MoE layers of each part."""

    layers_S: FloatArray
    dense_S: FloatArray
    losses_S: FloatArray
    mtp_S: FloatArray
    experts_SN: FloatArray


@lru_cache(maxsize=4096)
def _stages(model: ModelSpec, pp: int, vpp: int, layout: tuple[int, ...] | None, parts: int) -> _Held:
    layers_S, dense_S, losses_S, mtp_S = (np.zeros(pp) for _ in range(4))
    experts_SN = np.zeros((pp, parts))
    for chunk in pipeline_chunks(model, ParallelSpec(gpus=pp, pp=pp, vpp=vpp, layers_of_chunk=layout)):
        at = chunk.stage
        for layer in [*chunk.layers, *range(model.layers, model.layers + chunk.mtp_layers)]:
            layers_S[at] += 1
            if model.has_experts(layer):
                experts_SN[at, min(layer, model.layers - 1) * parts // model.layers] += 1
            else:
                dense_S[at] += 1
        losses_S[at] += chunk.loss
        mtp_S[at] += chunk.mtp_layers
    return _Held(layers_S, dense_S, losses_S, mtp_S, experts_SN)


def _sends(model: ModelSpec, spec: ParallelSpec, cluster: ClusterSpec, constants: StepConstants) -> float:
    """Seconds that one micro-batch's activations and gradients take between stages, as far as a stage waits."""
    if spec.pp == 1:
        return 0.0
    num_bytes = tokens_of(model, spec) / spec.tp * model.hidden * spec.element_bytes
    one_s = send_s(num_bytes, spec.gpus // spec.pp, cluster, constants)
    exposed = 1.0 if spec.vpp == 1 else 1.0 - constants.hidden_p2p_share
    return 2 * one_s * spec.vpp * exposed


def _after(
    model: ModelSpec,
    spec: ParallelSpec,
    cluster: ClusterSpec,
    constants: StepConstants,
    stage: int,
    micro_s: float,
) -> dict[str, float]:
    """Seconds of one stage for gradients and parameters, as far as they are exposed, and for the optimizer."""
    dense, expert = largest_state_bytes(model, spec, stage)
    dense_group, expert_group = Group(spec.dp * spec.cp, spec.tp), Group(spec.edp, spec.etp * spec.ep)

    def both(collective_s: Callable[..., float], dense_bytes: float, expert_bytes: float) -> float:
        return collective_s(dense_bytes, dense_group, cluster, constants) + collective_s(
            expert_bytes, expert_group, cluster, constants
        )

    if spec.distributed_optimizer:
        grads_s = both(ring_s, dense.gradients, expert.gradients)
        params_s = both(ring_s, dense.params, expert.params)
    else:  # every rank updates everything
        grads_s, params_s = both(all_reduce_s, dense.gradients, expert.gradients), 0.0
    # Megatron's overlap hides this traffic behind the last backward and the first forward of the step's micro-batches.
    backward_s, forward_s = micro_s * 2 / 3, micro_s / 3  # backward is twice forward
    exposed_grads_s, exposed_params_s = grads_s, params_s
    if spec.overlap_grad_reduce:
        exposed_grads_s = max(grads_s - constants.hidden_grad_share * backward_s, LEAST_EXPOSED_SHARE * grads_s)
    if spec.overlap_param_gather:
        exposed_params_s = max(params_s - constants.hidden_grad_share * forward_s, LEAST_EXPOSED_SHARE * params_s)
    owned = (dense.moments + expert.moments) / MOMENT_BYTES
    bandwidth = cluster.gpu.memory_bandwidth_bytes_s * constants.memory
    return {
        "grad_sync_s": exposed_grads_s,
        "param_gather_s": exposed_params_s,
        "optimizer_s": owned * OPTIMIZER_BYTES / bandwidth + constants.step_s,
    }
