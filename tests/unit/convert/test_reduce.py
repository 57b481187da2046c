"""Fewer experts: those that are left are the ones that the trace names, and the lines say what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.convert.reduce import Method, ReduceRecipe
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.routing_trace import RoutingTrace
from tests.support import hf_models

LAYERS, EXPERTS = 4, 8
# Assignments by layer and expert. Layer 0 keeps 1, 3, 5, 7, layer 1 the first four, layer 2 keeps 0, 2, 4, 6 (equally
# used ones are kept from the first on), layer 3 the last four.
LOADS_LE = np.array(
    [
        [1, 40, 2, 30, 3, 20, 4, 100],
        [9, 8, 7, 6, 5, 5, 5, 5],
        [5, 0, 5, 0, 5, 0, 5, 5],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
)
KEPT = [[1, 3, 5, 7], [0, 1, 2, 3], [0, 2, 4, 6], [4, 5, 6, 7]]


def trace_of(path: Path, loads_LE: np.ndarray, layers: Sequence[int]) -> Path:
    """Two records of two ranks, which add up to the loads times 4; layers in the given order."""
    counts_NLRE = np.broadcast_to(loads_LE, (2, 2, *loads_LE.shape)).transpose(0, 2, 1, 3).astype(np.uint32)
    RoutingTrace(counts=counts_NLRE, iteration=np.array([1, 2]), layer=np.array(layers)).save(path)
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def reduced(source: Path, folder: Path, trace: Path, method: Method) -> dict[str, torch.Tensor]:
    """Convert with four experts of each layer, and back."""
    recipe = ReduceRecipe(keep=4, method=method, trace=trace)
    convert(ConvertOptions(source=source, out=folder / "megatron", target="megatron", reduce=recipe))
    convert(ConvertOptions(source=folder / "megatron", out=folder / "back", target="hf"))
    return tensors(folder / "back")


def test_pruned_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kept ones are bit-equal in their order, with their router rows; all else is as it was."""
    source = hf_models.make("qwen3_moe", tmp_path / "hf", dtype=torch.bfloat16)
    trace = trace_of(tmp_path / "trace.npz", LOADS_LE[::-1], (4, 3, 2, 1))
    before, after = tensors(source), reduced(source, tmp_path, trace, "prune")
    said = capsys.readouterr().out
    for line in (
        "layer 0: 5.00% of the trace's assignments lost",
        "layer 1: 40.00% of the trace's assignments lost",
        "layer 2: 20.00% of the trace's assignments lost",
        "layer 3: 0.00% of the trace's assignments lost",
        "all layers: 16.25% of the assignments lost, at most 40.00% (layer 1)",
    ):
        assert line in said
    assert len(after) == len(before) - LAYERS * 4 * 3
    for layer, kept in enumerate(KEPT):
        where = f"model.layers.{layer}.mlp."
        assert torch.equal(after[f"{where}gate.weight"], before[f"{where}gate.weight"][kept])
        for new, old in enumerate(kept):
            for name in ("gate_proj", "up_proj", "down_proj"):
                assert torch.equal(
                    after[f"{where}experts.{new}.{name}.weight"], before[f"{where}experts.{old}.{name}.weight"]
                )
    others = [name for name in after if ".mlp." not in name]
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert hf_models.logits(tmp_path / "back", torch.arange(40)[None]).isfinite().all()  # transformers reads it


def test_merged_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A removed expert joins the kept one with the nearest router row, weighted by assignments."""
    source = hf_models.make("mixtral", tmp_path / "hf")
    trace = trace_of(tmp_path / "trace.npz", LOADS_LE, (1, 2, 3, 4))
    before, after = tensors(source), reduced(source, tmp_path, trace, "merge")
    assert "layer 1: 40.00% of the trace's assignments moved to a merged expert" in capsys.readouterr().out
    for layer, kept in enumerate(KEPT):
        where = f"model.layers.{layer}.block_sparse_moe."
        rows = torch.nn.functional.normalize(before[f"{where}gate.weight"], dim=1)
        assert torch.equal(after[f"{where}gate.weight"], before[f"{where}gate.weight"][kept])
        nearest = {old: old if old in kept else max(kept, key=lambda k: float(rows[k] @ rows[old])) for old in range(8)}
        for new, centre in enumerate(kept):
            members = [old for old, to in nearest.items() if to == centre]
            loads = torch.tensor(LOADS_LE[layer][members], dtype=torch.float32)
            for name in ("w1", "w2", "w3"):
                stacked = torch.stack([before[f"{where}experts.{old}.{name}.weight"] for old in members])
                wanted = torch.tensordot(loads / loads.sum(), stacked, 1)
                torch.testing.assert_close(after[f"{where}experts.{new}.{name}.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit(tmp_path: Path) -> None:
    source = hf_models.make("mixtral", tmp_path / "hf")
    grouped = hf_models.make("deepseek_v3", tmp_path / "v3")
    fits = trace_of(tmp_path / "trace.npz", LOADS_LE, (1, 2, 3, 4))
    empty = LOADS_LE.copy()
    empty[2] = 0
    cases = [
        (source, 1, fits, "--keep-experts = 1: must be at least 2, the experts of a token, and below 8"),
        (source, 8, fits, "--keep-experts = 8: must be at least 2, the experts of a token, and below 8"),
        (source, 4, trace_of(tmp_path / "a.npz", LOADS_LE[:3], (1, 2, 3)), "has 3 layers with experts, and the model"),
        (source, 4, trace_of(tmp_path / "b.npz", LOADS_LE[:, :6], (1, 2, 3, 4)), "has 6 experts, and the model has 8"),
        (source, 4, trace_of(tmp_path / "c.npz", empty, (1, 2, 3, 4)), "has no assignment in layer 2 of the model"),
        (source, 4, tmp_path / "none.npz", "--trace = '.*none.npz'"),
        (grouped, 4, fits, "n_group = 4: is not supported"),
        (tmp_path / "out", 4, fits, "--keep-experts = 4: changes a Hugging Face model. Convert it --to hf first"),
    ]  # fmt: skip
    convert(ConvertOptions(source=source, out=tmp_path / "out", target="megatron"))
    for folder, keep, trace, rule in cases:
        recipe = ReduceRecipe(keep=keep, method="prune", trace=trace)
        with pytest.raises(ConfigError, match=rule.replace("(", r"\(")):
            convert(ConvertOptions(source=folder, out=tmp_path / "new", target="megatron", reduce=recipe))
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "new.partial").exists()
