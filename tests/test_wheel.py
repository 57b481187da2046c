"""A wheel works without the repository: the tools and the launcher from an empty folder, with the shipped files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_smartmoe.ops import _build
from megatron_smartmoe.ops.library import LIBRARY

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
LAUNCH = (sys.executable, "-m", "megatron_smartmoe.adapter.launch")
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 2047".split()

pytestmark = pytest.mark.slow  # builds a wheel and installs it


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
    assert "megatron_smartmoe/adapter/launch/srun_per_node.sh" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "csrc/"))]


def test_the_wheel_is_named_by_what_its_library_needs(wheel: Path) -> None:
    """No part of the name depends on Python or torch; pip refuses it where the system is older."""
    glibc = "_".join(map(str, _build.needed_glibc(LIBRARY)))
    assert wheel.name.endswith(f"-py3-none-manylinux_{glibc}_{platform.machine()}.whl")


def test_the_compiled_ops_run_where_there_is_no_compiler(installation: Path, tmp_path: Path) -> None:
    """scripts/validation/check_wheel.py does it under other releases of torch, in environments of its own."""
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(installation)}
    command = [sys.executable, str(ROOT / "scripts" / "validation" / "check_wheel.py"), "--examine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    backend = "cpu+cuda" if b"launch_dispatch_map" in LIBRARY.read_bytes() else "cpu"
    assert f": compiled ({backend}), 5 ops called, in {installation}/megatron_smartmoe/ops\n" in done.stdout


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
