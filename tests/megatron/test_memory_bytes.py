"""The memory model against a real run: what Megatron allocates for parameters, gradients and optimizer, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.cost.memory.buffers import StateBytes, state_key, state_slices
from megatron_smartmoe.cost.memory.parameters import chunk_parameters
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.spec.model import LatentAttention, ModelSpec, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec, pipeline_chunks
from tests.support.allocation import allocated
from tests.support.marks import some_fast
from tests.support.models import SMALL

pytestmark = pytest.mark.dist

# Odd sizes everywhere, so that every padding rule has something to pad.
ODD = replace(
    SMALL,
    name="odd",
    layers=4,
    hidden=72,
    heads=4,
    query_groups=2,
    head_dim=20,
    ffn=136,
    vocab=500,
    seq_length=32,
    global_batch=8,
    moe=MoESpec(experts=8, top_k=2, ffn=88, shared_ffn=56, first_dense=1),
    qk_norm=True,
    tied=True,
)
PLAIN = replace(ODD, tied=False, qk_norm=False, moe=MoESpec(experts=8, top_k=2, ffn=88))
BIASED = replace(PLAIN, bias=True, norm="LayerNorm", gated=False, position="learned_absolute", dropout=0.1)
LATENT = replace(
    PLAIN,
    qk_norm=True,
    latent=LatentAttention(q_rank=24, kv_rank=16, qk_head_dim=16, qk_rope_dim=8, v_head_dim=16),
    moe=MoESpec(experts=8, top_k=2, ffn=88, first_dense=1, score_function="sigmoid", expert_bias=True),
)
MTP = replace(PLAIN, mtp_layers=1)
CPU = ParallelSpec(gpus=1, global_batch=8, implementation="local")
NOT_OVERLAPPED = {"overlap_grad_reduce": False, "overlap_param_gather": False}
MIXES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "one rank": (PLAIN, {"gpus": 1}),
    "EP2 x EDP2": (PLAIN, {"gpus": 4, "ep": 2}),
    "EP2 x EDP2, not overlapped": (ODD, {"gpus": 4, "ep": 2, **NOT_OVERLAPPED}),
    "EP4, no distributed optimizer": (ODD, {"gpus": 4, "ep": 4, "distributed_optimizer": False, **NOT_OVERLAPPED}),
    "PP2 x EP2, tied": (ODD, {"gpus": 4, "pp": 2, "ep": 2}),
    "PP2 x VPP2": (ODD, {"gpus": 2, "pp": 2, "vpp": 2}),
    "TP2 folded into EP2": (PLAIN, {"gpus": 2, "tp": 2, "ep": 2}),
    "TP2 x ETP2 x EP2": (PLAIN, {"gpus": 4, "tp": 2, "etp": 2, "ep": 2}),
    "biases, TP2 x EP4": (BIASED, {"gpus": 4, "tp": 2, "ep": 4}),
    "CP2 x EP2, bf16 gradients": (PLAIN, {"gpus": 4, "cp": 2, "ep": 2, "grad_reduce_in_fp32": False}),
    "latent attention, EP2": (LATENT, {"gpus": 2, "ep": 2}),
    "prediction block, PP2 x EP2": (MTP, {"gpus": 4, "pp": 2, "ep": 2}),
    "fp32, EP2": (PLAIN, {"gpus": 4, "ep": 2, "precision": "fp32"}),
}


@pytest.mark.parametrize("mix", some_fast(MIXES, "PP2 x EP2, tied"))
def test_bytes_equal_what_megatron_allocates(mix: str, tmp_path: Path) -> None:
    model, sizes = MIXES[mix]
    spec = replace(CPU, **sizes)
    held = allocated(megatron_flags(model, spec, cpu=True).all, spec.gpus, tmp_path)
    worst = 0
    for rank, one in enumerate(held):
        stage = rank // (spec.gpus // spec.pp)
        expected, names = StateBytes(), []
        for chunk in (c for c in pipeline_chunks(model, spec) if c.stage == stage):
            dense, expert = state_slices(model, state_key(model, spec, chunk))
            expected += dense[_place(rank, spec, expert=False)] + expert[_place(rank, spec, expert=True)]
            names.append([(p.name, p.numel, p.expert) for p in chunk_parameters(model, spec, chunk)])
        assert [[_ending(*n) for n in chunk] for chunk in one["names"]] == [[_ending(*n) for n in c] for c in names]
        assert expected == StateBytes(
            params=one["param_bytes"],
            gradients=one["grad_bytes"],
            main_params=one["main_param_bytes"],
            moments=one["moment_bytes"],
        )
        worst = max(worst, expected.total)
    print(f"{mix}: fullest rank {worst} bytes, Megatron's estimator {held[0]['megatron_estimate_bytes']:.0f}")


def _ending(name: str, numel: int, expert: bool) -> tuple[str, int, bool]:
    """The last two words of a name: the module, and weight or bias."""
    return ".".join(name.split(".")[-2:]), numel, expert


def _place(rank: int, spec: ParallelSpec, *, expert: bool) -> int:
    """A rank's place in its data-parallel group (with CP) or its EDP group; order tp-cp-ep-dp-pp."""
    in_stage = rank % (spec.gpus // spec.pp)
    if expert:
        return in_stage // (spec.etp * spec.ep)
    return in_stage // spec.tp  # cp varies faster than dp, and the group is both
