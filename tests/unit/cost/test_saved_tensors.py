"""Lists of kept tensors: TransformerEngine's by hand; the local ones are compared with runs in tests/megatron."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_smartmoe.cost.memory.activations import chunk_bytes, layer_bytes
from megatron_smartmoe.cost.memory.saved_tensors import Rank, total
from megatron_smartmoe.cost.memory.saved_torch import layer
from megatron_smartmoe.spec.parallel import ParallelSpec, Recompute, pipeline_chunks
from tests.support.models import SMALL

FUSED = ParallelSpec(gpus=8, ep=4, micro_batch=2, global_batch=64, homes_interval=100)
LOCAL = replace(FUSED, implementation="local")
TOKENS = 2 * 2048  # of a micro-batch
ROW = 2 * 1024  # bytes of a token's hidden state


def test_transformer_engine_by_hand() -> None:
    kept = layer_bytes(SMALL, FUSED, experts=True, imbalance=1.5)
    qkv = 2 * (16 + 2 * 4) * 64
    assert kept.attention == TOKENS * (2 * ROW + qkv + 2 * 16 * 64 + 4 * 16)  # norm, projection, output, statistics
    assert kept.mlp == TOKENS * (2 * ROW + 3 * 16 * 4 + 2 * 8)  # norm, router, indices of top-2
    assert kept.experts == 1.5 * 2 * TOKENS * (ROW + 3 * 2 * 2048 + 8)


def test_plain_torch_keeps_six_inner_rows_where_fused_code_keeps_three() -> None:
    fused, local = (layer_bytes(SMALL, spec, experts=True, imbalance=1.0) for spec in (FUSED, LOCAL))
    assert local.experts - fused.experts == 2 * TOKENS * (3 * 2 * 2048 + 4 - 8)  # weights in, indices out
    assert local.kept > fused.kept


@pytest.mark.parametrize("size", ["tp", "cp", "micro_batch", "etp"])
def test_sizes_divide_the_layer(size: str) -> None:
    sizes: list[dict[str, Any]] = [{size: 1}, {size: 2}]
    whole, parts = (layer_bytes(SMALL, replace(LOCAL, **each), experts=True, imbalance=1.0) for each in sizes)
    if size == "micro_batch":
        assert (
            parts.experts == 2 * layer_bytes(SMALL, replace(LOCAL, micro_batch=1), experts=True, imbalance=1.0).experts
        )
    elif size == "etp":  # twice the rows, half as wide
        assert whole.experts < parts.experts < 1.5 * whole.experts
    else:
        assert parts.experts == whole.experts / 2


@pytest.mark.parametrize("recompute", ["none", "moe", "full"])
def test_what_is_recomputed_is_at_work_instead(recompute: Recompute) -> None:
    spec = replace(LOCAL, recompute=recompute)
    plain, kept = layer_bytes(SMALL, LOCAL, True, 2.0), layer_bytes(SMALL, spec, True, 2.0)
    assert kept.kept + kept.working >= plain.kept + plain.working
    (chunk,) = pipeline_chunks(SMALL, spec)
    part = chunk_bytes(SMALL, spec, chunk, 2.0)
    assert part.experts == (SMALL.layers * plain.experts if recompute == "none" else 0.0)


def test_every_tensor_has_a_name_of_its_own() -> None:
    model = replace(SMALL, qk_norm=True, dropout=0.1, moe=replace(SMALL.moe, shared_ffn=512))
    parts = layer(Rank(model, LOCAL, 1.0), True)
    tensors = (*parts.attention, *parts.norm, *parts.mlp, *parts.experts)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert total(tensors) == sum(tensor.nbytes for tensor in tensors)
