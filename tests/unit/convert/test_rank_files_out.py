"""Megatron's older format as output: each file is what the modules of a rank load, and nothing is lost."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from megatron_smartmoe.convert import rank_layout
from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.errors import CheckpointError, ConfigError
from tests.support import hf_models


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rank(out: Path, folder: str) -> dict[str, Any]:
    """A rank's file as Megatron reads it: by torch.load, which builds no object but those that are allowed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: dict[str, Any] = torch.load(out / "release" / folder / "model_optim_rng.pt")
    return found


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2_moe", {"tensor_ranks": 2, "stages": 2, "expert_ranks": 2}),
        ("deepseek_v3", {"tensor_ranks": 4}),
        ("deepseek_v3", {"tensor_ranks": 2, "spec": "te"}),
        ("llama", {"stages": 4}),  # with tied embeddings
    ],
)
def test_there_and_back_is_bit_equal(
    family: str, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_layout, "SLICE_BYTES", 2_000)  # several slices of each tensor
    source = hf_models.make(family, tmp_path / "hf")
    convert(ConvertOptions(source=source, out=tmp_path / "ranks", target="torch", **sizes))
    assert verify(tmp_path / "ranks" / "release").is_whole
    assert all(zipfile.ZipFile(path).testzip() is None for path in (tmp_path / "ranks").rglob("*.pt"))
    convert(ConvertOptions(source=tmp_path / "ranks", out=tmp_path / "back", target="hf"))
    before, after = weights(source), weights(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rank_has_its_layers_experts_and_parts(tmp_path: Path) -> None:
    source = hf_models.make("qwen2_moe", tmp_path / "hf")
    sizes: dict[str, Any] = {"tensor_ranks": 2, "stages": 2, "expert_ranks": 2}
    convert(ConvertOptions(source=source, out=tmp_path / "ranks", target="torch", **sizes))
    hf = weights(source)
    found = rank(tmp_path / "ranks", "mp_rank_01_001_001")
    args, model = found["args"], found["model"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.expert_model_parallel_size, args.padded_vocab_size, args.ckpt_format) == (2, 256, "torch")
    # The second stage's first layer is layer 2, the second expert rank's first expert is expert 4.
    layer, expert = "model.layers.2.", "model.layers.2.mlp.experts.4."
    here = "decoder.layers.0."
    assert torch.equal(model[f"{here}input_layernorm.weight"], hf[f"{layer}input_layernorm.weight"])
    gate, up = (hf[f"{expert}{name}_proj.weight"][24:] for name in ("gate", "up"))
    inner = f"{here}mlp.experts.local_experts.0."
    assert torch.equal(model[f"{inner}linear_fc1.weight"], torch.cat([gate, up]))
    assert torch.equal(model[f"{inner}linear_fc2.weight"], hf[f"{expert}down_proj.weight"][:, 24:])
    assert model[f"{inner}linear_fc1._extra_state"] is None
    assert torch.equal(model["output_layer.weight"][:122], hf["lm_head.weight"][128:])
    assert not model["output_layer.weight"][122:].any()  # of the 256 padded rows
    assert "embedding.word_embeddings.weight" not in model
    assert not any("layers.2." in name or "local_experts.4" in name for name in model)


def test_a_rank_whose_file_is_gone(tmp_path: Path) -> None:
    """Also the last one, without which all others look like a smaller model."""
    source = hf_models.make("mixtral", tmp_path / "hf")
    convert(ConvertOptions(source=source, out=tmp_path / "ranks", target="torch", expert_ranks=2))
    release = tmp_path / "ranks" / "release"
    (release / "smartmoe_manifest.json").unlink()
    (release / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ConfigError, match=r"is damaged: mp_rank_00_001/model_optim_rng\.pt is missing"):
        convert(ConvertOptions(source=tmp_path / "ranks", out=tmp_path / "out", target="megatron"))
    with pytest.raises(CheckpointError, match=r"is incomplete: mp_rank_00_001/model_optim_rng\.pt is missing"):
        read_contents(release)


def test_a_source_whose_bytes_have_changed(tmp_path: Path) -> None:
    source = hf_models.make("mixtral", tmp_path / "hf")
    convert(ConvertOptions(source=source, out=tmp_path / "megatron", target="megatron"))
    with (tmp_path / "megatron" / "release" / "__0_0.distcp").open("r+b") as file:
        file.seek(200_000)
        file.write(b"changed!")
    with pytest.raises(ConfigError, match=r"is damaged: __0_0\.distcp"):
        convert(ConvertOptions(source=tmp_path / "megatron", out=tmp_path / "out", target="hf"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("family", "sizes", "text"),
    [
        ("mixtral", {"stages": 3}, "--pp = 3: must divide layers, and there are 4. For example: --pp 1."),
        ("mixtral", {"expert_ranks": 3}, "--ep = 3: must divide experts, and there are 8."),
        ("mixtral", {"tensor_ranks": 8}, "--tp = 8: must divide query groups, and there are 4."),
        ("olmoe", {"tensor_ranks": 3}, "--tp = 3: must divide attention heads, and there are 8."),
        ("llama", {"tensor_ranks": 64}, "--tp = 64: must divide attention heads"),
    ],
)
def test_sizes_that_do_not_divide_the_model(family: str, sizes: dict[str, Any], text: str, tmp_path: Path) -> None:
    source = hf_models.make(family, tmp_path / "hf")
    with pytest.raises(ConfigError) as error:
        convert(ConvertOptions(source=source, out=tmp_path / "out", target="torch", **sizes))
    assert text in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
