"""What goes in comes out bit for bit; a killed conversion resumes; nothing appears before it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_smartmoe.checkpoint.manifest import read_manifest
from megatron_smartmoe.checkpoint.torch_dist import read_index
from megatron_smartmoe.checkpoint.verify import verify
from megatron_smartmoe.convert import output, torch_dist_files
from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.errors import ConfigError
from tests.support import hf_models


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def there_and_back(source: Path, folder: Path, **options: object) -> tuple[Path, Path]:
    convert(ConvertOptions(source=source, out=folder / "megatron", target="megatron", **options))  # type: ignore[arg-type]
    convert(ConvertOptions(source=folder / "megatron", out=folder / "back", target="hf"))
    return folder / "megatron", folder / "back"


@pytest.mark.parametrize(
    ("family", "spec"),
    [*((family, "local") for family in hf_models.MODELS), ("qwen3_moe", "te"), ("deepseek_v3", "te")],
)
def test_bit_equal(family: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with slices of a few kilobytes, so that tensors are cut, and several files."""
    monkeypatch.setattr(torch_dist_files, "SLICE_BYTES", 5000)
    monkeypatch.setattr(torch_dist_files, "FILE_BYTES", 400_000)
    source = hf_models.make(family, tmp_path / "hf")
    megatron, back = there_and_back(source, tmp_path, spec=spec)
    before, after = weights(source), weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((megatron / "release").glob("*.distcp"))) > 2
    checked = verify(megatron / "release")
    assert checked.is_whole
    manifest = read_manifest(megatron / "release")
    assert manifest is not None
    of_experts = [entry for entry in manifest.digests if ".mlp.experts." in entry.name]
    assert all(len(set(entry.digests)) == 8 for entry in of_experts)  # every expert is there, and none twice
    assert bool(of_experts) == (family not in ("llama", "qwen2", "qwen3"))
    if spec == "local":  # transformers reads it, and the configuration is the same
        logits = [hf_models.logits(folder, torch.arange(40)[None]) for folder in (source, back)]
        assert torch.equal(logits[0], logits[1])


def test_a_bfloat16_model(tmp_path: Path) -> None:
    source = hf_models.make("mixtral", tmp_path / "hf", dtype=torch.bfloat16)
    _, back = there_and_back(source, tmp_path)
    before, after = weights(source), weights(back)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def test_8_bit_blocks_are_dequantised(tmp_path: Path) -> None:
    source = hf_models.make("deepseek_v3", tmp_path / "hf", dtype=torch.bfloat16)
    wanted: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        quantised = {}
        for name, tensor in load_file(path).items():
            wanted[name] = quantised[name] = tensor
            if not name.endswith("_proj.weight"):
                continue
            rows, columns = tensor.shape
            scales = torch.rand(-(-rows // 40), -(-columns // 24)) + 0.5
            small = (tensor.float() * 2).to(torch.float8_e4m3fn)
            by_element = scales.repeat_interleave(40, 0)[:rows].repeat_interleave(24, 1)[:, :columns]
            wanted[name] = (small.float() * by_element).bfloat16()
            quantised |= {name: small, f"{name}_scale_inv": scales}
        save_file(quantised, path)
    index = source / "model.safetensors.index.json"
    places = {name: path.name for path in source.glob("*.safetensors") for name in load_file(path)}
    index.write_text(json.dumps({"weight_map": places}))
    hf_models.change_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [40, 24]})
    _, back = there_and_back(source, tmp_path)
    after = weights(back)
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


@pytest.mark.parametrize("spec", ["local", "te"])
def test_layers_that_predict_further_tokens(spec: str, tmp_path: Path) -> None:
    """As the released DeepSeek-V3 has them: behind the other layers, with copies of embedding and output layer."""
    source = hf_models.make("deepseek_v3", tmp_path / "hf")
    found = weights(source)
    more = {
        name.replace("layers.3.", "layers.4."): tensor + 1 for name, tensor in found.items() if ".layers.3." in name
    }
    for name, shape in (("enorm", 64), ("hnorm", 64), ("shared_head.norm", 64), ("eh_proj", (64, 128))):
        more[f"model.layers.4.{name}.weight"] = torch.randn(shape)
    more["model.layers.4.embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    more["model.layers.4.shared_head.head.weight"] = found["lm_head.weight"].clone()
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file({**found, **more}, source / "model.safetensors")
    hf_models.change_config(source, num_nextn_predict_layers=1)
    megatron, back = there_and_back(source, tmp_path, spec=spec)
    after = weights(back)
    assert after.keys() == {**found, **more}.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in {**found, **more}.items())
    assert verify(megatron / "release").is_whole
    keys = read_index(megatron / "release").shapes
    norm = "pre_mlp_layernorm" if spec == "te" else "input_layernorm"
    assert f"mtp.layers.0.transformer_layer.{norm}.weight" in keys
    assert keys["mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight"] == (8, 96, 64)


def test_a_killed_conversion_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist_files, "FILE_BYTES", 300_000)
    source = hf_models.make("mixtral", tmp_path / "hf")
    options = ConvertOptions(source=source, out=tmp_path / "out", target="megatron", workers=1)
    written, real = [], output._write

    def dies_at_the_third(partial: Path, file: output.OutputFile, progress: object) -> output.Written:
        written.append(file.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(partial, file, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(output, "_write", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="was left by a conversion of another source or with other options"):
        convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron", dtype="bf16"))
    convert(options)
    assert written[3:].count(written[0]) == 0  # finished files are kept
    assert verify(tmp_path / "out" / "release").is_whole
    assert not (tmp_path / "out.partial").exists()


def test_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_models.make("llama", tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="and its disk has 1 kB free"):
        convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_values_between_types_are_numbers(tmp_path: Path) -> None:
    source = hf_models.make("llama", tmp_path / "hf")
    convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron", dtype="bf16"))
    convert(ConvertOptions(source=tmp_path / "out", out=tmp_path / "back", target="hf", dtype="fp32"))
    before, after = weights(source), weights(tmp_path / "back")
    assert all(np.array_equal(before[name].bfloat16().float(), after[name]) for name in before)
