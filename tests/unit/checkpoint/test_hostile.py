"""Checkpoints that are damaged anywhere: one kind of error, whatever the bytes are."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.checkpoint.inspection import inspect
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from megatron_smartmoe.errors import CheckpointError
from tests.support.torch_dist_files import STATE, write

CASES = 150
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each format."""
    root = tmp_path_factory.mktemp("hostile")
    weights = {NORM: torch.ones(6), f"{STATE}exp_avg.{NORM}": torch.ones(6)}
    rank = root / "torch" / "mp_rank_00"
    rank.mkdir(parents=True)
    groups = [{"params": [0], "wd_mult": 0.0}]
    optimizer = {"optimizer": {"param_groups": groups, "state": {0: {"exp_avg": torch.ones(6)}}}}
    torch.save({"model": {NORM: torch.ones(6)}, "optimizer": optimizer, "iteration": 7}, rank / "model_optim_rng.pt")
    return {"torch_dist": write(root / "torch_dist", weights), "torch": root / "torch"}


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_the_undamaged_ones_are_read(kind: str, folders: dict[str, Path]) -> None:
    contents = read_contents(folders[kind])
    assert [str(key) for key in contents.parameters] == [f"{NORM}, weight", f"{NORM}, first moment"]
    assert contents.iteration == 7


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("torch_dist", ".metadata"),
        ("torch_dist", "__0_0.distcp"),
        ("torch_dist", "metadata.json"),
        ("torch", "mp_rank_00/model_optim_rng.pt"),
    ],
)
def test_damage_anywhere_is_an_error_with_a_place(kind: str, name: str, folders: dict[str, Path]) -> None:
    path = folders[kind] / name
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for case in range(CASES):
        data = bytearray(whole)
        if case % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for at in rng.integers(0, len(data), rng.integers(1, 5)):
                data[at] = rng.integers(0, 256) if case % 3 == 1 else data[at] ^ 1
        path.write_bytes(data)
        try:
            read_contents(folders[kind])
        except CheckpointError:
            refused += 1
        inspect(folders[kind])
        verify(folders[kind])
    path.write_bytes(whole)
    assert refused > CASES // 10


ARGUMENTS: list[dict[str, Any]] = [
    {"num_experts": "many"},
    {"pipeline_model_parallel_size": "x"},
    {"expert_tensor_parallel_size": "x", "num_experts": 4},
    {"smartmoe_placement": {"version": 1, "slots": [[[10**30]]], "experts": 1}},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_wrong_types(arguments: dict[str, Any], tmp_path: Path) -> None:
    rank = tmp_path / "mp_rank_00"
    rank.mkdir()
    model = {"decoder.layers.0.mlp.experts.weight1": torch.ones(4, 2, 3)}
    torch.save({"model": model, "args": argparse.Namespace(**arguments)}, rank / "model_optim_rng.pt")
    with contextlib.suppress(CheckpointError):
        read_contents(tmp_path)
    verify(tmp_path)
