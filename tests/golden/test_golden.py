"""Runs go on: what an earlier commit left behind (see make.py) is resumed and read by this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_smartmoe.cli.main import main as smartmoe
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.spec.cluster import load_cluster_spec
from tests.support.training import metrics

ROOT = Path(__file__).parents[2]
COMMITS = sorted(path.parent for path in Path(__file__).parent.glob("*/run"))
RELATIVE = 1e-6  # other processors round sums differently; on one and the same the bits are equal


@pytest.fixture(params=COMMITS, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_are_golden_files() -> None:
    assert COMMITS


@pytest.mark.dist
def test_the_run_resumes(golden: Path, tmp_path: Path) -> None:
    """With its own configuration, its plan, its checkpoint and the placement in it; the losses are those of old."""
    shutil.copytree(golden / "run", tmp_path / "run")
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--run-dir", "run", "--parallel", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    assert "--parallel auto: reuses the plan in run/plan.json" in done.stdout
    assert (tmp_path / "run" / "plan.json").read_bytes() == (golden / "run" / "plan.json").read_bytes()
    assert re.search(r"smartmoe: .*(back where they were|restored expert placement)", done.stdout)
    resumed = {str(line["iteration"]): line["lm loss"] for line in metrics(tmp_path / "run")[4:] if "lm loss" in line}
    assert resumed == pytest.approx(json.loads((golden / "losses.json").read_text()), rel=RELATIVE)


def test_the_checkpoint_is_read_without_torch(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smartmoe(["checkpoint", "verify", str(golden / "run" / "checkpoints")]) == 0
    assert "not checked     checksums and digests: there is no manifest" in capsys.readouterr().out


def test_decisions_of_training_are_read(golden: Path) -> None:
    names = {field.name for field in fields(Decision)}
    for line in (golden / "run" / "smartmoe.jsonl").read_text().splitlines():
        assert set(json.loads(line)) <= names


def test_the_simulator_makes_the_same_decisions(golden: Path, tmp_path: Path) -> None:
    """From the settings in the saved file; only the words that explain them may be others, and more may be said."""
    saved, again = golden / "decisions.jsonl", tmp_path / "again.jsonl"
    status = smartmoe(
        ["simulate", "--trace", str(golden / "trace.npz"), "--replay", str(saved), "--save-decisions", str(again)]
    )
    assert status in (0, 1)  # 1: a line differs

    before, now = ([json.loads(line) for line in path.read_text().splitlines()] for path in (saved, again))
    assert len(before) == len(now)
    for old, new in zip(before, now, strict=True):
        assert {key: new.get(key) for key in old} | {"why": ""} == old | {"why": ""}


def test_the_cluster_file_loads(golden: Path) -> None:
    cluster = load_cluster_spec(golden / "cluster.yaml")
    assert cluster.gpus_per_node == 2
    assert cluster.sources["gpu.peak_flops"].startswith("measured")
