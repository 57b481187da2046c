"""The handful of constants between a cluster file and a step's time, and what they make of a cluster.

Method. A machine reaches a share of each of its peaks; the shares are the model's only free constants, each between 0
and 1 and each with a prior, which a cluster file may replace (its `efficiency`). They scale the cluster before
`moe_layer.constants_of` sees it, so the MoE layer's time comes from the one cost model that the trainer uses too.
Measured runs move the shares (scripts/validation/validate_planner.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_smartmoe.cost.compute import ExpertShape, replica_grad_bytes
from megatron_smartmoe.cost.moe_layer import (
    GEMM_EFFICIENCY,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    LayerConstants,
    constants_of,
    exchanges_of,
)
from megatron_smartmoe.spec.cluster import SHARES, ClusterSpec, LevelSpec, LinkSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import HIERARCHICAL, ParallelSpec


@dataclass(frozen=True, kw_only=True)
class StepConstants:
    """Shares of the peaks in the cluster file, and a few counts: all estimates, none of them is measured.

    Attributes:
        gemm: large matrix products, of the dense peak.
        attention: fused attention, of the same peak.
        memory: kernels bound by memory, of the nominal bandwidth.
        ring_intra: all-gather and reduce-scatter inside a node, of a GPU's links.
        ring_inter: the same between nodes.
        all_reduce_intra: all-reduce inside a node, each of its halves; None: as the ring.
        all_reduce_inter: the same between nodes.
        all_to_all_intra: token exchange inside a node.
        all_to_all_inter: the same between nodes.
        launch_s: seconds from one small kernel to the next, where the GPU waits for it.
        launches_per_layer: such kernels of a layer without its experts, forward and backward.
        step_s: seconds of a step for clipping, logging and data.
        row_passes: H-wide rows read or written per token and layer by norms, residuals and activations, both ways.
        fused_attention: scores never reach memory.
        hidden_grad_share: share of one micro-batch's backward pass that gradient traffic may hide behind.
        hidden_p2p_share: share of the sends between stages that the interleaved schedule hides.
    """

    gemm: float = GEMM_EFFICIENCY
    attention: float = 0.4
    memory: float = MEMORY_EFFICIENCY
    ring_intra: float = 0.7
    ring_inter: float = 0.8
    all_reduce_intra: float | None = None
    all_reduce_inter: float | None = None
    all_to_all_intra: float = LINK_EFFICIENCY
    all_to_all_inter: float = LINK_EFFICIENCY
    launch_s: float = 10e-6
    launches_per_layer: float = 60.0
    step_s: float = 10e-3
    row_passes: float = 24.0
    fused_attention: bool = True
    hidden_grad_share: float = 0.5
    hidden_p2p_share: float = 0.8

    @classmethod
    def of(cls, cluster: ClusterSpec) -> StepConstants:
        """The shares that the cluster file names, and the priors of the others.

        A file that names `gemm` and not `attention` leaves their ratio as it was: attention is a share of the same
        peak, and a peak that was measured with matrix products is lower than a datasheet's.
        """
        shares: dict[str, Any] = {name: share for name, share in cluster.efficiency.items() if name in SHARES}
        if "gemm" in shares and "attention" not in shares:
            shares["attention"] = cls.attention * shares["gemm"] / cls.gemm
        return replace(cls(), **shares)

    @property
    def all_reduce_shares(self) -> tuple[float, float]:
        """Shares of the bandwidth that an all-reduce reaches inside a node and between nodes."""
        intra, inter = self.all_reduce_intra, self.all_reduce_inter
        return self.ring_intra if intra is None else intra, self.ring_inter if inter is None else inter


def layer_constants(
    cluster: ClusterSpec,
    model: ModelSpec,
    spec: ParallelSpec,
    constants: StepConstants,
    *,
    shared_card: bool = False,
    exchanges: int | None = None,
) -> LayerConstants:
    """Constants of the MoE layer: per token that reaches a rank's expert-tensor group, per expert, per replica.

    With ETP > 1 a rank computes 1 / ETP of every expert on the tokens of ETP ranks, hence the factor.

    Args:
        cluster: the machine.
        model: the model.
        spec: the launch.
        constants: shares of the peaks.
        shared_card: see `constants_of`.
        exchanges: collectives of a layer's all-to-alls, for a system of another kind; None for this project's layer.
    """
    gpu = replace(
        cluster.gpu,
        peak_flops=cluster.gpu.peak_flops * constants.gemm,
        memory_bandwidth_bytes_s=cluster.gpu.memory_bandwidth_bytes_s * constants.memory,
    )
    scaled = replace(
        cluster,
        gpu=gpu,
        nodes=spec_nodes(cluster, spec.ep * spec.etp),
        intra_node=_scaled(cluster.intra_node, constants.all_to_all_intra),
        inter_node=_scaled(cluster.inter_node, constants.all_to_all_inter),
        levels=tuple(_scaled_level(cluster, level, constants.all_to_all_inter) for level in cluster.levels),
        efficiency=dict.fromkeys(SHARES, 1.0),  # already applied above
    )
    found = constants_of(
        scaled,
        expert_shape(model, spec),
        ranks=spec.ep,
        shared_network_card=shared_card,
        two_hops=spec.dispatch == HIERARCHICAL,
        exchanges=exchanges_of_launch(model, spec) if exchanges is None else exchanges,
    )
    # A rank of the expert-parallel group is ETP ranks of the domain.
    levels = tuple(replace(level, ranks=max(1, level.ranks // spec.etp)) for level in found.levels)
    return replace(found, token_s=found.token_s * spec.etp, levels=levels)


def exchanges_of_launch(model: ModelSpec, spec: ParallelSpec) -> int:
    """Collectives of the all-to-alls of this project's layer."""
    return exchanges_of(
        "hierarchical" if spec.dispatch == HIERARCHICAL else "alltoall",
        ranks=spec.ep,
        slots=model.moe.experts // spec.ep + spec.spare_slots,
        chunks=spec.overlap_degree,
        expert_tensor_ranks=spec.etp,
    )


def expert_shape(model: ModelSpec, spec: ParallelSpec) -> ExpertShape:
    """One expert as one rank holds it."""
    return ExpertShape(
        hidden=model.hidden,
        ffn=model.moe.ffn // spec.etp,
        gated=model.gated,
        element_bytes=spec.element_bytes,
        grad_bytes=replica_grad_bytes(spec.replicas, spec.element_bytes),
        biases=model.bias,
    )


def spec_nodes(cluster: ClusterSpec, consecutive_ranks: int) -> int:
    """Nodes that a group of consecutive ranks touches."""
    return max(1, -(-consecutive_ranks // cluster.gpus_per_node))


def _scaled_level(cluster: ClusterSpec, level: LevelSpec, prior: float) -> LevelSpec:
    """A level at the share that its file names, or at that of the links between nodes."""
    return replace(level, link=_scaled(level.link, cluster.efficiency.get(f"all_to_all_{level.name}", prior)))


def _scaled(link: LinkSpec, share: float) -> LinkSpec:
    return replace(link, bandwidth_bytes_s=link.bandwidth_bytes_s * share)
