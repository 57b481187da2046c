"""`smartmoe checkpoint`: what it prints, its exit status, and that torch is not imported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.checkpoint.directory import TRACKER
from megatron_smartmoe.cli.main import main
from megatron_smartmoe.spec.placement import Placement
from tests.support.torch_dist_files import EXPERT_KEY, STATE, model, write
from tests.unit.checkpoint.test_verify import NORM, with_manifest

PLACEMENT = Placement(slots_LRS=np.array([[[0, 1], [2, 3]], [[3, 1], [2, 0]]]), num_experts=4)
ARGS = argparse.Namespace(
    num_layers=2,
    num_experts=4,
    hidden_size=6,
    expert_model_parallel_size=2,
    bf16=True,
    lr=0.001,
    wandb_api_key="abcdef",
    smartmoe_placement=PLACEMENT.to_json(),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with checkpoints of iterations 5 and 10; one expert differs."""
    tensors = model()
    with_manifest(write(tmp_path / "iter_0000005", tensors))
    tensors[EXPERT_KEY][1, 3, 0, 0] += 1
    tensors[f"{STATE}param.{EXPERT_KEY}"][1, 3] = tensors[EXPERT_KEY][1, 3].float()
    cut = {EXPERT_KEY: (1, 2, 1, 1)}
    with_manifest(write(tmp_path / "iter_0000010", tensors, cut, args=ARGS, iteration=10))
    (tmp_path / TRACKER).write_text("10")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit status, lines of output, and errors."""
    status = main(["checkpoint", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err


def test_verify_a_whole_one(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run(capsys, "verify", saved)
    assert status == 0
    assert lines[0] == f"{saved}/iter_0000010"
    assert lines[1].startswith("files           4 files, ")
    assert lines[1].endswith("; sizes and checksums compared with the manifest")
    assert lines[2:] == [
        "parameters      12 (of each layer and expert), all numbers read",
        "digests         48 compared with the ranks' memory at the save",
        "main weights    of 12 parameters compared with the weights",
        "result          whole",
    ]


def test_verify_a_damaged_one(saved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = saved / "iter_0000005" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    written = tmp_path / "result.json"
    status, lines, _ = run(capsys, "verify", saved / "iter_0000005", "--files-only", "--json", written)
    assert status == 1
    assert lines[-2:] == [
        "DAMAGED         __0_0.distcp has other bytes than were saved (its checksum differs)",
        "result          damaged: 1 finding",
    ]
    content = json.loads(written.read_text())
    assert not content["whole"]
    assert [finding["kind"] for finding in content["findings"]] == ["file"]


def test_verify_names_many_findings_once(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {key: torch.zeros_like(tensor) for key, tensor in model().items() if key.startswith(f"{STATE}param")}
    write(saved / "iter_0000015", model() | tensors)
    status, lines, _ = run(capsys, "verify", saved, "--iteration", 15)
    assert status == 1
    assert sum("does not round to the weights" in line for line in lines) == 12
    assert lines[-1] == "result          damaged: 12 findings"


def test_show(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run(capsys, "show", saved)
    assert status == 0
    assert lines[:2] == [f"{saved}/iter_0000010", "iteration       10"]
    assert lines[2].startswith("manifest        4 files, ")
    assert lines[3:] == [
        "weights         942 numbers, 1.88 kB, bfloat16",
        "main weights    942 numbers, 3.77 kB, float32",
        "first moments   942 numbers, 3.77 kB, float32",
        "second moments  942 numbers, 3.77 kB, float32",
        "model           num_layers 2, hidden_size 6, num_experts 4",
        "layout          expert_model_parallel_size 2",
        "training        lr 0.001, bf16 True",
        "placement       2 layers, 2 ranks of 2 slots",
        "                layer 0: 0 1 | 2 3",
        "                layer 1: 3 1 | 2 0",
    ]


def test_show_all_masks_secrets(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = run(capsys, "show", saved, "--all")
    assert "argument        wandb_api_key = ***" in lines
    assert "argument        hidden_size = 6" in lines
    _, lines, _ = run(capsys, "show", saved, "--json", "-")
    content = json.loads("\n".join(lines))
    assert content["arguments"]["wandb_api_key"] == "***"
    assert content["placement"] == PLACEMENT.to_json()
    assert content["numbers"]["weight"] == {"elements": 942, "size_bytes": 1884, "types": ["bfloat16"]}


def test_compare(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run(capsys, "compare", saved, saved, "--iteration-b", 5)
    assert status == 1
    assert lines[2] == "equal           46 parameters of layers and experts, by the digests of the manifests"
    expert = "differs         decoder.layers.1.mlp.experts.linear_fc1.weight, expert 3"
    assert lines[3].startswith(f"{expert}, main weight: 96 of 96 numbers, by up to ")
    assert lines[4].startswith(f"{expert}, weight: 1 of 96 numbers, by up to 0.992 (relative 0.105)")
    assert lines[-1] == "result          different in 0 parameters and 1 matrix of experts"
    status, lines, _ = run(capsys, "compare", saved, saved / "iter_0000010", "--read-all")
    assert status == 0
    assert lines[2:] == [
        "equal           48 parameters of layers and experts, by the digests of the files",
        "result          equal to the bit",
    ]


def test_compare_prints_as_many_as_asked_for(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(saved / "iter_0000020", model(seed=2))
    status, lines, _ = run(capsys, "compare", saved, saved, "--iteration-b", 20, "--most", 2)
    assert status == 1
    assert len([line for line in lines if line.startswith("differs")]) == 2
    assert "                and 46 more; --most and --json show them" in lines


FOUND = "(found: 10, 5)."


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            "verify {}/nothing",
            "DIR = '{}/nothing': is no directory. Pass the directory that --load names, or a folder iter_NNNNNNN in "
            "it.",
        ),
        ("show {} --iteration 7", "DIR = '{}': there is no checkpoint iter_0000007. Pass --iteration N " + FOUND),
        (
            "compare {} {} --iteration-b 7",
            "B = '{}': there is no checkpoint iter_0000007. Pass --iteration-b N " + FOUND,
        ),
        ("compare {} {} --most -1", "--most = -1: must be at least 0. For example: --most 100."),
        (
            "show {} --json {}/no/file",
            "--json = '{}/no/file': cannot be written: No such file or directory. Pass another file.",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments: str, error: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, printed = run(capsys, *arguments.replace("{}", str(saved)).split())
    assert status == 2
    assert printed == f"smartmoe checkpoint: {error.format(saved)}\n"


@pytest.mark.parametrize(("content", "says"), [(None, "has no tracker"), ("abc", "does not hold the number of")])
def test_a_directory_whose_tracker_says_nothing(
    content: str | None, says: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / TRACKER).unlink()
    if content is not None:
        (saved / TRACKER).write_text(content)
    status, _, error = run(capsys, "verify", saved)
    assert status == 2
    assert says in error
    assert error.endswith("Pass --iteration N (found: 10, 5).\n")


def test_show_of_a_damaged_one_points_to_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "iter_0000010" / ".metadata").write_bytes(b"")
    status, _, error = run(capsys, "show", saved)
    assert status == 2
    assert error.endswith(f"Run smartmoe checkpoint verify {saved}/iter_0000010 for all that is wrong.\n")


def test_torch_is_not_imported(saved: Path) -> None:
    code = (
        "import sys; from megatron_smartmoe.cli.main import main\n"
        f"status = main(['checkpoint', 'verify', {str(saved)!r}])\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_a_placement_that_cannot_be_read(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken: Any = {**PLACEMENT.to_json(), "digest": "0"}
    args = argparse.Namespace(smartmoe_placement=broken)
    write(saved / "iter_0000025", {NORM: torch.zeros(6)}, args=args)
    _, lines, _ = run(capsys, "show", saved, "--iteration", 25)
    assert lines[-1].startswith("placement       cannot be read: placement digest = '0'")
