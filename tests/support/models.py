"""The small model and the small cluster that tests share; a test that needs other sizes replaces them."""

from __future__ import annotations

from megatron_smartmoe.spec.cluster import ClusterSpec, GpuSpec, LinkSpec
from megatron_smartmoe.spec.model import ModelSpec, MoESpec

SMALL = ModelSpec(
    name="small",
    layers=8,
    hidden=1024,
    heads=16,
    query_groups=4,
    head_dim=64,
    ffn=4096,
    vocab=32000,
    seq_length=2048,
    global_batch=64,
    moe=MoESpec(experts=16, top_k=2, ffn=2048, aux_loss_coeff=0.01),
)
CLUSTER = ClusterSpec(
    name="2x4",
    nodes=2,
    gpus_per_node=4,
    gpu=GpuSpec(name="G", peak_flops=300e12, memory_bytes=24e9, memory_bandwidth_bytes_s=2e12),
    intra_node=LinkSpec(bandwidth_bytes_s=300e9, latency_s=5e-6),
    inter_node=LinkSpec(bandwidth_bytes_s=25e9, latency_s=15e-6),
)
