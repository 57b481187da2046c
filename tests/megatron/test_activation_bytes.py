"""The model of activations against a real run: what autograd keeps of one micro-batch, rank by rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.cost.memory.activations import chunk_bytes
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.spec.model import LatentAttention, ModelSpec, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec, PipelineChunk, pipeline_chunks, violation
from tests.support.activations import kept
from tests.support.marks import some_fast
from tests.support.models import SMALL

pytestmark = pytest.mark.dist

TOLERANCE = 0.01  # 5% is what a planner needs; here no tensor of a percent shall be missing
# Wide enough that scalars do not matter, every size its own.
PLAIN = replace(
    SMALL,
    name="plain",
    layers=2,
    hidden=128,
    heads=4,
    query_groups=2,
    head_dim=40,
    ffn=640,
    vocab=1000,
    seq_length=256,
    global_batch=8,
    moe=MoESpec(experts=8, top_k=2, ffn=320, aux_loss_coeff=0.01),
)
FOUR = replace(PLAIN, layers=4)
MIXED = replace(PLAIN, qk_norm=True, moe=replace(PLAIN.moe, top_k=3, shared_ffn=192, first_dense=1))
SHARED = replace(PLAIN, qk_norm=True, tied=True, moe=replace(PLAIN.moe, shared_ffn=192, pre_softmax=True))
PLAINER = replace(PLAIN, norm="LayerNorm", gated=False, position="learned_absolute")
LATENT = replace(
    PLAIN,
    qk_norm=True,
    latent=LatentAttention(q_rank=64, kv_rank=48, qk_head_dim=32, qk_rope_dim=16, v_head_dim=32),
    moe=MoESpec(experts=8, top_k=2, ffn=320, score_function="sigmoid", expert_bias=True),
)
# The launches of a planner on CPU ranks: with --smartmoe, unless a mix says otherwise.
CPU = ParallelSpec(gpus=1, implementation="local", homes_interval=100)
STOCK = {"homes_interval": 0}
MIXES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "one rank": (PLAIN, {}),
    "EP2, 2 samples, all-to-alls in 2 pieces": (PLAIN, {"gpus": 2, "ep": 2, "micro_batch": 2, "overlap_degree": 2}),
    "EP4": (PLAIN, {"gpus": 4, "ep": 4}),
    "PP2": (PLAIN, {"gpus": 2, "pp": 2}),
    "PP2 x VPP2": (FOUR, {"gpus": 2, "pp": 2, "vpp": 2}),
    "TP2 folded into EP2, shared expert": (SHARED, {"gpus": 2, "tp": 2, "ep": 2}),
    "TP2 x ETP2": (PLAIN, {"gpus": 2, "tp": 2, "etp": 2}),
    "CP2 folded into EP2": (PLAIN, {"gpus": 2, "cp": 2, "ep": 2}),
    "fp32, shared expert": (SHARED, {"precision": "fp32"}),
    "dense first layer, shared expert": (MIXED, STOCK),
    "prediction block": (replace(PLAIN, mtp_layers=1), STOCK),
    "latent attention, TP2 x EP2": (LATENT, {"gpus": 2, "tp": 2, "ep": 2}),
    "LayerNorm, biases, GELU, dropout, EP2": (replace(PLAINER, bias=True, dropout=0.1), {"gpus": 2, "ep": 2, **STOCK}),
    "LayerNorm, GELU, MoE layers recomputed": (PLAINER, {"recompute": "moe"}),
    "all layers recomputed, PP2": (PLAIN, {"gpus": 2, "pp": 2, "recompute": "full"}),
}


@pytest.mark.parametrize("mix", some_fast(MIXES, "EP4"))
def test_bytes_are_what_autograd_keeps(mix: str, tmp_path: Path) -> None:
    model, sizes = MIXES[mix]
    spec = replace(CPU, **sizes)
    spec = replace(spec, global_batch=spec.micro_batch * spec.dp * spec.pp)
    assert violation(model, spec) is None
    ranks = kept(megatron_flags(model, spec, cpu=True).all, spec.gpus, tmp_path)
    modelled = [_modelled(model, spec, rank, one["expert_rows"]) for rank, one in enumerate(ranks)]
    fullest = max(range(spec.gpus), key=lambda rank: ranks[rank]["bytes"])
    errors = [ours / one["bytes"] - 1 for ours, one in zip(modelled, ranks, strict=True)]
    worst = max(errors, key=abs)
    print(
        f"| {mix} | {ranks[fullest]['bytes']} | {modelled[fullest]:.0f} | {worst:+.2%} "
        f"| {ranks[0]['megatron_estimate_bytes']:.0f} |"
    )
    assert abs(worst) <= TOLERANCE, list(zip(modelled, [one["bytes"] for one in ranks], strict=True))


def _modelled(model: ModelSpec, spec: ParallelSpec, rank: int, expert_rows: int) -> float:
    """Bytes of one micro-batch of each of the rank's chunks, under the load that its experts had."""
    stage = rank // (spec.gpus // spec.pp)
    mine = [chunk for chunk in pipeline_chunks(model, spec) if chunk.stage == stage]
    mean = _moe_layers(model, mine) * spec.micro_batch * model.seq_length / spec.cp / spec.tp * model.moe.top_k
    parts = [chunk_bytes(model, spec, chunk, expert_rows / (mean * spec.etp)) for chunk in mine]
    return sum(part.layers + part.experts + part.logits for part in parts)


def _moe_layers(model: ModelSpec, mine: list[PipelineChunk]) -> int:
    numbers = [layer for chunk in mine for layer in (*chunk.layers, *[model.layers] * chunk.mtp_layers)]
    return sum(model.has_experts(layer) for layer in numbers)
