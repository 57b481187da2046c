"""Folders that are not what they say: one line each, and nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.errors import SmartMoEError
from tests.support import hf_models

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make("mixtral", tmp_path_factory.mktemp("hostile") / "mixtral")


def file_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


def without_tensor(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    tensors = load_file(path)
    del tensors[EXPERT]
    save_file(tensors, path)


def without_tensor_and_its_entry(folder: Path) -> None:
    without_tensor(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][EXPERT]
    path.write_text(json.dumps(index))


def with_another_tensor(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    save_file({**load_file(path), "model.layers.1.block_sparse_moe.experts.8.w1.weight": torch.ones(3)}, path)


def with_a_wrong_shape(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    save_file({**load_file(path), EXPERT: torch.ones(64, 95)}, path)


def truncated(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    path.write_bytes(path.read_bytes()[:-100])


def with_a_pickle(folder: Path) -> None:
    file_of(folder, EXPERT).write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


def with_a_file_of_torch_save(folder: Path) -> None:
    torch.save({"a": torch.ones(3)}, file_of(folder, EXPERT))


def as_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_file(folder: Path) -> None:
    file_of(folder, EXPERT).unlink()


def with_a_path_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = "../model.safetensors"
    path.write_text(json.dumps(index))


def with_integers(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    save_file({**load_file(path), EXPERT: torch.ones(64, 96, dtype=torch.int32)}, path)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (without_tensor, "is incomplete: its index names tensor " + EXPERT),
        (without_tensor_and_its_entry, "is incomplete: it has no tensor " + EXPERT),
        (with_another_tensor, "a mixtral model of this config.json has no tensor model.layers.1"),
        (with_a_wrong_shape, r"has shape \[64, 95\], and by config.json \[64, 96\]"),
        (truncated, "is truncated: it has"),
        (with_a_pickle, "is no safetensors file: it begins like a pickle"),
        (with_a_file_of_torch_save, "is no safetensors file: it begins like a pickle"),
        (as_pickles, r"has its weights as pickles \(pytorch_model.bin\)"),
        (without_a_file, "cannot be read: No such file"),
        (with_a_path_outside, "no safetensors file beside it"),
        (with_integers, "is of type int32"),
    ],
)
def test_one_line_and_nothing_written(damage: Callable[[Path], None], rule: str, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    damage(source)
    with pytest.raises(SmartMoEError, match=rule) as raised:
        convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron"))
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
