"""What a simulation is priced with: the cluster, the expert, and how replicas travel in training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.compute import ExpertShape, replica_grad_bytes
from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, Dispatcher
from megatron_smartmoe.cost.moe_layer import ALL_TO_ALLS, constants_of, crossing_bytes_s, transfer_price
from megatron_smartmoe.cost.replicas import TransferPrice, schedule_of
from megatron_smartmoe.placement.layer_cost import LayerPricing
from megatron_smartmoe.placement.layer_plan import Sees
from megatron_smartmoe.spec.cluster import ClusterSpec, GpuSpec, LinkSpec
from megatron_smartmoe.spec.parallel import HIERARCHICAL
from megatron_smartmoe.spec.trace import RoutingTrace

# Assumed without --cluster, for the predicted times and the price of replicas. NVIDIA's H100 SXM datasheet (dense bf16,
# NVLink 4, one 400 Gb/s card per GPU); latencies are estimates.
DEFAULT_CLUSTER = ClusterSpec(
    name="8 H100 SXM per node",
    nodes=1,
    gpus_per_node=8,
    gpu=GpuSpec(name="H100", peak_flops=989.4e12, memory_bytes=80e9, memory_bandwidth_bytes_s=3.35e12),
    intra_node=LinkSpec(bandwidth_bytes_s=450e9, latency_s=5e-6),
    inter_node=LinkSpec(bandwidth_bytes_s=50e9, latency_s=15e-6),
)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The price list of a simulation.

    Attributes:
        cluster: machine and links.
        expert: one expert; a replica's gradient travels in 2 or 4 bytes by the way that replicas are planned.
        num_ranks: R, ranks of a group.
        num_nodes: nodes that they are on.
        micro_batches: of an iteration, as the trace has them.
        rank_tokens: tokens that a rank computes in a micro-batch and layer if the load is even; decides how much of a
            replica's way is hidden.
        num_groups: groups of group-limited routing, which homes keep whole; 1 for routing without.
        margin: times its cost that a replica must save, as --smartmoe-replicas-margin; 0 makes all of them.
        first_version: replicas travel in every micro-batch, with fp32 gradients, and nothing is hidden: the prices of
            decision files that were made before replicas had a schedule.
        dispatcher: what sends the tokens.
        exchanges: collectives of a layer's all-to-alls, see `moe_layer.exchanges_of`.
    """

    cluster: ClusterSpec
    expert: ExpertShape
    num_ranks: int
    num_nodes: int
    micro_batches: int
    rank_tokens: float = 0.0
    num_groups: int = 1
    margin: float = 1.0
    first_version: bool = False
    dispatcher: Dispatcher = ALL_TO_ALL
    exchanges: int = ALL_TO_ALLS

    @property
    def domains(self) -> int:
        """Parts of the group that replicas are planned in; see `or_group`."""
        return self.cluster.domains(self.num_nodes, self.cluster.replica_scope)

    @property
    def or_group(self) -> bool:
        """Whether replicas may be anywhere where that is cheaper: the default of --smartmoe-replicas-scope."""
        return self.cluster.replica_scope == "auto"

    @property
    def balanced_nodes(self) -> int:
        """Nodes that homes are balanced over, or the wider domains that replicas stay in."""
        return self.domains if self.domains > 1 else self.num_nodes

    @property
    def migration_bytes_s(self) -> float:
        """Bandwidth of a rank while homes move."""
        if self.first_version:
            return (self.cluster.inter_node if self.num_nodes > 1 else self.cluster.intra_node).bandwidth_bytes_s
        return crossing_bytes_s(self.cluster, self.num_nodes)

    def layer(self, mode: Sees) -> LayerPricing:
        """The price of a layer whose replicas are planned in this way."""
        expert = self.expert_of(mode)
        pricing = LayerPricing(
            num_ranks=self.num_ranks,
            num_nodes=self.num_nodes,
            constants=constants_of(
                self.cluster, expert, two_hops=self.dispatcher.name == HIERARCHICAL, exchanges=self.exchanges
            ),
            dispatcher=self.dispatcher,
        )
        if self.first_version:
            return pricing
        return replace(pricing, replicas=schedule_of(mode, expert, micro_batches=self.micro_batches))

    def expert_of(self, mode: Sees) -> ExpertShape:
        """The expert, with the gradient's type as it travels."""
        if self.first_version:
            return self.expert
        return replace(self.expert, grad_bytes=replica_grad_bytes(mode, self.expert.element_bytes))

    def replica_price(self, mode: Sees) -> TransferPrice:
        """What replicas cost that are planned in this way, in tokens of an iteration; of a micro-batch if `exact`."""
        layer = self.layer(mode)
        return transfer_price(
            layer.constants,
            layer.replicas,
            self.rank_tokens,
            num_nodes=self.num_nodes,
            domains=self.domains,
            margin=self.margin,
            dispatcher=self.dispatcher,
        )


def rank_tokens(trace: RoutingTrace, num_ranks: int) -> float:
    """Mean tokens of a rank in a micro-batch and layer that has any, in groups of `num_ranks`."""
    total_N = trace.counts.sum(axis=(-1, 2), dtype=np.float64).ravel()
    groups = max(1, trace.num_sources // num_ranks)
    return float(total_N[total_N > 0].mean()) / groups / num_ranks if (total_N > 0).any() else 0.0
