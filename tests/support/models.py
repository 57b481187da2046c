"""The small model of tests that train nothing; a test that needs another size replaces that size."""

from __future__ import annotations

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
