"""Launches: sizes that follow from others, chunks, and the rule that a wrong one breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.spec.model import LatentAttention, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec, pipeline_chunks, violation
from tests.support.models import SMALL

MODEL = replace(
    SMALL,
    hidden=64,
    heads=8,
    head_dim=8,
    ffn=128,
    vocab=500,
    seq_length=64,
    moe=MoESpec(experts=8, top_k=2, ffn=96),
    mtp_layers=1,
)
SPEC = ParallelSpec(gpus=32, tp=2, pp=4, ep=4, micro_batch=2, global_batch=64)


def test_sizes_that_follow() -> None:
    assert (SPEC.dp, SPEC.edp, SPEC.micro_batches) == (4, 2, 8)
    assert violation(MODEL, SPEC) is None


def test_chunks_in_pipeline_order() -> None:
    found = list(pipeline_chunks(MODEL, replace(SPEC, pp=2, vpp=2)))
    assert [(c.stage, c.virtual, c.layers) for c in found] == [
        (0, 0, (0, 1)),
        (1, 0, (2, 3)),
        (0, 1, (4, 5)),
        (1, 1, (6, 7)),
    ]
    assert [(c.embedding, c.loss, c.mtp_layers) for c in found] == [(True, False, 0)] + 2 * [(False, False, 0)] + [
        (False, True, 1)
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpus": 36}, "TP x PP x CP = 8 does not divide 36 ranks"),
        ({"ep": 8, "etp": 2}, "ETP x EP x PP = 64 does not divide 32 ranks"),
        ({"ep": 3, "gpus": 96}, "EP 3 does not divide 8 experts"),
        ({"tp": 8, "pp": 1}, "TP 8 does not divide 4 query groups"),
        ({"pp": 16, "tp": 1, "ep": 2}, "PP x VPP = 16 does not divide 8 layers evenly"),
        ({"vpp": 2, "pp": 1}, "the interleaved schedule needs at least two stages"),
        ({"vpp": 2, "micro_batch": 8}, "the interleaved schedule needs 4 micro-batches, there are 2"),
        ({"micro_batch": 3}, "micro-batch x DP = 12 does not divide the global batch of 64"),
        ({"spare_slots": 1}, "spare slots need replicas: auto, history or exact"),
        ({"replicas": "history"}, "replicas need EP > 1 and spare slots"),
        ({"distributed_optimizer": False}, "overlapping the parameter gather needs"),
        ({"layers_of_chunk": (2, 2, 2, 1)}, "layers_of_chunk must be 4 numbers that sum to 8"),
        ({"recompute": "act", "implementation": "local"}, "needs TransformerEngine's grouped GEMM"),
    ],
)
def test_the_rule_that_is_broken(change: dict[str, object], reason: str) -> None:
    assert reason in (violation(MODEL, replace(SPEC, **change)) or "")  # type: ignore[arg-type]


def test_latent_attention_divides_by_heads() -> None:
    latent = LatentAttention(kv_rank=16, qk_head_dim=8, qk_rope_dim=8, v_head_dim=8)
    model = replace(MODEL, latent=latent, query_groups=8)
    assert violation(model, replace(SPEC, tp=8, pp=1, global_batch=64)) is None
