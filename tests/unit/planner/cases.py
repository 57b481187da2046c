"""A small model and a small cluster that searches finish on in a moment."""

from __future__ import annotations

from megatron_smartmoe.planner.load import LoadModel, scenarios_from_skew
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.spec.cluster import ClusterSpec, GpuSpec, LinkSpec
from megatron_smartmoe.spec.model import ModelSpec
from tests.support.models import SMALL

CLUSTER = ClusterSpec(
    name="2x4",
    nodes=2,
    gpus_per_node=4,
    gpu=GpuSpec(name="G", peak_flops=300e12, memory_bytes=24e9, memory_bandwidth_bytes_s=2e12),
    intra_node=LinkSpec(bandwidth_bytes_s=300e9, latency_s=5e-6),
    inter_node=LinkSpec(bandwidth_bytes_s=25e9, latency_s=15e-6),
)


def pricing(skew: float = 3.0, model: ModelSpec = SMALL, cluster: ClusterSpec = CLUSTER) -> Pricing:
    return Pricing(model, cluster, LoadModel(scenarios_from_skew(model, skew, "test")))
