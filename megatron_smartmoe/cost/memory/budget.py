"""A rank's memory, stage by stage, in parts that add up."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_smartmoe.cost.memory.activations import activation_bytes
from megatron_smartmoe.cost.memory.buffers import largest_state_bytes, staging_bytes
from megatron_smartmoe.cost.step.pipeline import in_flight
from megatron_smartmoe.spec.cluster import GpuSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, distinct_stages, stage_chunks

FRAGMENTATION = 0.04  # share of the memory that is lost between blocks: an estimate
STATE_BYTES = 12  # bytes per parameter: fp32 main parameter and two moments
REPLICA_GRADIENT_BYTES = 4  # bytes per parameter: replicas' gradients are summed in fp32 whatever the others are


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes that the fullest rank of one stage holds; `total` is the sum of the parts."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    expert_activations: float
    logits: float
    working: float
    replicas: float
    staging: float
    reserved: float

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return float(sum(vars(self).values()))

    def parts(self) -> list[tuple[str, float]]:
        """(what, bytes) of every part that is not zero."""
        return [(LABELS[f.name], getattr(self, f.name)) for f in fields(self) if getattr(self, f.name)]


LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "main weights and moments",
    "activations": "activations",
    "expert_activations": "experts' activations, busiest rank",
    "logits": "logits",
    "working": "one layer recomputed, dispatch buffers",
    "replicas": "replica slots",
    "staging": "staging for moved experts",
    "reserved": "runtime libraries, fragmentation",
}


def memory_budget(model: ModelSpec, spec: ParallelSpec, gpu: GpuSpec, imbalance: float) -> tuple[MemoryBudget, int]:
    """(fullest stage's budget, which stage); `imbalance` is the busiest rank's tokens over the mean."""
    stages = distinct_stages(model, spec.pp, spec.vpp, spec.layers_of_chunk)
    found = [stage_budget(model, spec, gpu, stage, imbalance) for stage in stages]
    at = max(range(len(found)), key=lambda i: found[i].total)
    return found[at], stages[at]


def stage_budget(model: ModelSpec, spec: ParallelSpec, gpu: GpuSpec, stage: int, imbalance: float) -> MemoryBudget:
    """Bytes of the fullest rank of one stage."""
    dense, expert = largest_state_bytes(model, spec, stage)
    state = dense + expert
    kept = activation_bytes(model, spec, stage, imbalance)
    matrices = 3 if model.gated else 2
    numel = matrices * model.hidden * model.moe.ffn // spec.etp
    moe_layers = sum(
        sum(model.has_experts(layer) for layer in chunk.layers) + chunk.mtp_layers * model.has_experts(model.layers)
        for chunk in stage_chunks(model, spec, stage)
    )
    moves, home_slots = spec.homes_interval > 0 and spec.ep > 1, model.moe.experts // spec.ep
    return MemoryBudget(
        weights=state.params,
        gradients=state.gradients,
        optimizer=state.main_params + state.moments,
        activations=kept.layers,
        expert_activations=kept.experts,
        logits=kept.logits,
        working=kept.working,
        replicas=replica_bytes(model, spec, stage, moe_layers, numel),
        staging=float(staging_bytes(numel * (spec.element_bytes + STATE_BYTES), home_slots)) if moves else 0.0,
        reserved=gpu.reserved_bytes + FRAGMENTATION * gpu.memory_bytes,
    )


def replica_bytes(model: ModelSpec, spec: ParallelSpec, stage: int, moe_layers: int, numel: int) -> float:
    """Bytes of the spare slots of a stage: weights and gradients that stay and, with `auto`, the weights of layers that
    are planned anew, from a micro-batch's forward to its backward pass; at the worst all layers, every time.

    Args:
        model: sizes.
        spec: the launch.
        stage: pipeline stage.
        moe_layers: its layers with experts.
        numel: parameters of one expert on a rank.
    """
    kept = moe_layers * (spec.element_bytes + REPLICA_GRADIENT_BYTES)
    anew = 0.0
    if spec.replicas == "auto":
        held = in_flight(stage, spec.pp, spec.vpp, spec.micro_batches) / spec.vpp
        layers = 1.0 if spec.recompute in ("full", "moe") else moe_layers * held  # fetched again to be recomputed
        anew = layers * spec.element_bytes
    return float(spec.spare_slots * numel * (kept + anew))
