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


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_experts_per_tok": 9}, "must be at most the number of experts, 8"),
        ({"num_hidden_layers": 10**9}, "must be at most 10,000"),
        ({"num_local_experts": 10**8}, "is not possible: 100,000,000 experts in each of 4 layers"),
        ({"router_aux_loss_coef": "x"}, "must be a number, at least 0"),
        ({"rms_norm_eps": None}, "must be a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "it has 'full_attention'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "is of kind 'linear'"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_a_config_that_no_such_model_has(changes: dict[str, object], rule: str, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    hf_models.change_config(source, **changes)
    with pytest.raises(SmartMoEError, match=rule):
        convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_output_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(SmartMoEError, match="is a symbolic link"):
        convert(ConvertOptions(source=model, out=tmp_path / "out", target="megatron"))
    assert not (tmp_path / "out.partial").exists()


def test_an_option_that_does_not_fit_the_source(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SmartMoEError, match="--ep = 4: arranges optimizer state"):
        convert(ConvertOptions(source=model, out=tmp_path / "out", target="megatron", expert_ranks=4))
