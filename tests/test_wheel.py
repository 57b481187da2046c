"""A wheel works without the repository: the tools and the launcher from an empty folder, with the shipped files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_smartmoe.ops.library import LIBRARY

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
LAUNCH = (sys.executable, "-m", "megatron_smartmoe.adapter.launch")
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 2047".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout with the ops that it has compiled already."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    environment = {**os.environ, "SMARTMOE_LIBRARY": str(LIBRARY), "SMARTMOE_REQUIRE_BUILD": "1"}
    subprocess.run(command, env=environment, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a folder that Python searches before this checkout."""
    folder = tmp_path_factory.mktemp("installation")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True)
    return folder


def run(command: list[str], folder: Path, installation: Path) -> str:
    """What a command prints that is run in `folder` with the installation."""
    environment = {**os.environ, "PYTHONPATH": str(installation)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_the_shipped_files_and_the_ops(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"megatron_smartmoe/{path.relative_to(ROOT)}" in names
    assert "megatron_smartmoe/ops/_smartmoe.so" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "csrc/"))]


def test_plan_takes_the_names_of_shipped_files(installation: Path, tmp_path: Path) -> None:
    smartmoe = str(installation / "bin" / "smartmoe")
    printed = run(
        [smartmoe, "plan", "--model", "quickstart", "--cluster", "cpu", "--gpus", "4"], tmp_path, installation
    )
    assert printed.startswith("quickstart on 4 x CPU-thread")


@pytest.mark.dist
def test_the_quickstart_trains_in_an_empty_folder(installation: Path, tmp_path: Path) -> None:
    """Named without a path; the data would go into ./data and the run into ./runs."""
    printed = run([*LAUNCH, "--config", "quickstart", "--dry-run"], tmp_path, installation)
    assert "--output-prefix data/python-stdlib/corpus" in printed
    assert "--smartmoe-run-dir runs/quickstart-" in printed
    assert list(tmp_path.iterdir()) == []

    flags = "--nproc 2 --pipeline-model-parallel-size 1 --train-iters 4 --lr-warmup-iters 1 --eval-iters 0".split()
    flags += ["--log-interval", "1"]
    printed = run([*LAUNCH, "--config", "quickstart", *flags, *MOCK_DATA], tmp_path, installation)
    assert "python -m megatron_smartmoe.adapter.launch --run-dir runs/quickstart-" in printed
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) >= 4
    assert json.loads((run_dir / "environment.json").read_text())["git"] is None
