"""Megatron to Megatron: every parameter is carried, also those that only this project's routers have."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.torch_dist import read_index
from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions, Target
from tests.support.torch_dist_files import EXPERTS, HIDDEN, LAYERS, STATE, model, write

# Of the gates noisy-top-k and moe++ (docs/gates.md).
OF_GATES = {
    "noise_weight": (LAYERS, EXPERTS, HIDDEN),
    "zero_weight": (LAYERS, 4, HIDDEN),
    "constant_weight": (LAYERS, 2 * 2, HIDDEN),
    "constant_vector": (LAYERS, 2, HIDDEN),
    "residual_weight": (LAYERS, EXPERTS + 4, EXPERTS + 4),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = model()
    for name, shape in OF_GATES.items():
        key = f"decoder.layers.mlp.router.{name}"
        tensors[key] = torch.randn(shape).bfloat16()
        tensors |= {f"{STATE}{kind}.{key}": torch.randn(shape) for kind in ("param", "exp_avg", "exp_avg_sq")}
    sizes = {"num_layers": LAYERS, "num_experts": EXPERTS, "hidden_size": HIDDEN, "num_attention_heads": 2}
    args = argparse.Namespace(**sizes, swiglu=True, use_distributed_optimizer=True, tensor_model_parallel_size=1)
    return write(tmp_path / "saved" / "iter_0000007", tensors, optimizer={"param_groups": []}, args=args)


@pytest.mark.parametrize("target", ["megatron", "torch"])
def test_parameters_of_gates_are_carried(target: Target, saved: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(source=saved, out=tmp_path / "out", target=target))
    before, after = read_contents(saved), read_contents(tmp_path / "out" / "iter_0000007")
    wanted = {key for key in before.parameters if target == "megatron" or key.kind == "weight"}
    assert set(after.parameters) == wanted
    assert all(before.digest(key) == after.digest(key) for key in wanted)
    assert sum(name in key.name for key in wanted for name in OF_GATES) == len(OF_GATES) * LAYERS * len(
        {key.kind for key in wanted}
    )
    if target == "megatron":
        shapes = read_index(saved).shapes
        assert read_index(tmp_path / "out" / "iter_0000007").shapes == shapes
