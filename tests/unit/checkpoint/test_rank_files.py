"""The older format: what each rank wrote under its own names is the model that a torch_dist checkpoint holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_smartmoe.checkpoint.compare import compare
from megatron_smartmoe.checkpoint.inspection import inspect
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.errors import CheckpointError
from tests.support.torch_dist_files import EXPERT_KEY, EXPERTS, FFN, LAYERS, STATE, model, write

EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
ROUTER = "decoder.layers.mlp.router.weight"
Tensors = dict[str, torch.Tensor]


def local_state(
    tensors: Tensors, prefix: str, *, tp: tuple[int, int], pp: tuple[int, int], ep: tuple[int, int], slots: bool
) -> Tensors:
    """What a rank holds, by its own names: of (number, size) in each direction."""
    found: Tensors = {}
    if pp[0] == 0:
        found[EMBEDDING] = tensors[prefix + EMBEDDING].chunk(tp[1])[tp[0]]
    per_stage, per_rank = LAYERS // pp[1], EXPERTS // ep[1]
    for layer in range(per_stage):
        number = pp[0] * per_stage + layer
        found[f"decoder.layers.{layer}.mlp.router.weight"] = tensors[prefix + ROUTER][number]
        experts = []
        for expert in range(per_rank):
            whole = tensors[prefix + EXPERT_KEY][number, ep[0] * per_rank + expert]
            halves = [rows.chunk(tp[1])[tp[0]] for rows in whole.split(FFN)]
            experts.append(torch.cat(halves))
        name = f"decoder.layers.{layer}.mlp.experts."
        if slots:
            found[f"{name}weight1"] = torch.stack(experts)
        else:
            found |= {f"{name}local_experts.{n}.linear_fc1.weight": matrix for n, matrix in enumerate(experts)}
    if pp[0] == pp[1] - 1:
        found[NORM] = tensors[prefix + NORM]
    return {name: tensor.clone() for name, tensor in found.items()}


def optimizer(tensors: Tensors, rank: dict[str, Any]) -> list[dict[str, Any]]:
    """Megatron's optimizers of a rank: one for experts and one for all others, in groups by weight decay."""
    states = {kind: local_state(tensors, f"{STATE}{kind}.", **rank) for kind in ("param", "exp_avg", "exp_avg_sq")}
    found = []
    for is_expert in (False, True):
        names = [name for name in states["param"] if (".experts." in name) == is_expert]
        groups, mains = [], []
        numbered: dict[int, Tensors] = {}
        for decay in (1.0, 0.0):
            members = [name for name in names if (states["param"][name].dim() > 1) == bool(decay)]
            numbers = [len(numbered) + n for n in range(len(members))]
            groups.append({"params": numbers, "wd_mult": decay, "is_expert_parallel": is_expert})
            mains.append([states["param"][name] for name in members])
            for number, name in zip(numbers, members, strict=True):
                numbered[number] = {kind: states[kind][name] for kind in ("exp_avg", "exp_avg_sq")}
        inner = {"param_groups": groups, "state": numbered}
        found.append({"optimizer": inner, "fp32_from_fp16_params": mains})
    return found


def write_ranks(folder: Path, tensors: Tensors, *, tp: int = 1, pp: int = 1, ep: int = 1, **how: bool) -> Path:
    slots, state = how.get("slots", False), how.get("state", True)
    args = argparse.Namespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        num_experts=EXPERTS,
        swiglu=True,
        bf16=True,
    )
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (pp > 1) + f"_{e:03d}" * (ep > 1)
                rank: dict[str, Any] = {"tp": (t, tp), "pp": (p, pp), "ep": (e, ep), "slots": slots}
                content = {"args": args, "iteration": 7, "model": local_state(tensors, "", **rank)}
                if state:
                    content["optimizer"] = optimizer(
                        tensors, {**rank, "slots": slots or how.get("state_in_slots", False)}
                    )
                (folder / name).mkdir(parents=True)
                torch.save(content, folder / name / "model_optim_rng.pt")
    return folder


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2": {"ep": 2},
    "EP4, state in slots": {"ep": 4, "state_in_slots": True},
    "TP2 x PP2 x EP2, slots": {"tp": 2, "pp": 2, "ep": 2, "slots": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(layout: str, tmp_path: Path) -> None:
    tensors = model()
    whole = read_contents(write(tmp_path / "whole", tensors))
    folder = write_ranks(tmp_path / "ranks", tensors, **LAYOUTS[layout])
    ranks = read_contents(folder)
    assert ranks.iteration == 7
    assert ranks.buffers == {}
    assert not any(ranks.missing_elements(key) for key in ranks.parameters)
    result = compare(whole, ranks)
    assert result.is_equal, (result.only_in_first, result.only_in_second, result.differences)
    assert result.num_equal == len(whole.parameters)
    assert inspect(folder).is_whole


def test_state_that_fits_no_parameter_is_counted(tmp_path: Path) -> None:
    tensors = model()
    folder = write_ranks(tmp_path / "ranks", tensors)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer"][0]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(content, path)
    found = read_contents(folder)
    assert {key.kind for key in found.parameters} == {"weight"}
    assert found.buffers["mp_rank_00, optimizer.0.optimizer.state.0.exp_avg"] == 3


def test_without_optimizer(tmp_path: Path) -> None:
    found = read_contents(write_ranks(tmp_path / "ranks", model(), state=False))
    assert ({key.kind for key in found.parameters}, found.buffers) == ({"weight"}, {})


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "ranks", model(), tp=2, pp=2)
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    assert inspect(folder).problems == ("mp_rank_01_001/model_optim_rng.pt is missing",)


def test_a_truncated_rank_is_named(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "ranks", model(), tp=2)
    path = folder / "mp_rank_01" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert inspect(folder).problems == ("mp_rank_01/model_optim_rng.pt is damaged: it has no end",)


def test_experts_that_are_cut_otherwise(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "ranks", model(), tp=2)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].expert_tensor_parallel_size = 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="its experts are cut by 1 and its other layers by 2"):
        read_contents(folder)
