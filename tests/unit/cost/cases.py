"""Constants and flows that are easy to compute by hand."""

import numpy as np
from numpy.typing import ArrayLike

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow
from megatron_smartmoe.spec.cluster import ClusterSpec, GpuSpec, LinkSpec

ROUND = LayerConstants(
    fixed_s=1.0,
    source_token_s=0.1,
    token_s=0.5,
    expert_s=2.0,
    intra_token_s=0.25,
    inter_gpu_token_s=1.0,
    inter_node_token_s=0.5,
    inter_node_reverse_token_s=0.125,
    intra_replica_s=3.0,
    inter_replica_s=7.0,
)


def contiguous_flow(counts_RE: ArrayLike, num_nodes: int = 1) -> LayerFlow:
    """Experts at home in order, no replicas."""
    counts_RE = np.asarray(counts_RE)
    slots_RS = np.arange(counts_RE.shape[1]).reshape(counts_RE.shape[0], -1)
    return LayerFlow.equal_split(counts_RE, slots_RS, num_nodes)


def cluster(*, nodes: int = 2, intra_bytes_s: float = 100.0, inter_bytes_s: float = 10.0) -> ClusterSpec:
    """Round numbers."""
    return ClusterSpec(
        name="round",
        nodes=nodes,
        gpus_per_node=2,
        gpu=GpuSpec(name="round", peak_flops=1000.0, memory_bytes=1e9, memory_bandwidth_bytes_s=1000.0),
        intra_node=LinkSpec(bandwidth_bytes_s=intra_bytes_s, latency_s=0.5),
        inter_node=LinkSpec(bandwidth_bytes_s=inter_bytes_s, latency_s=2.0),
    )
