"""Wrong input stops the launcher itself: one line on stderr, status 2, no torchrun, nothing created."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import TINY_MODEL, TINY_TRAINING

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
WITHOUT_DATA = [*TINY_MODEL, *TINY_TRAINING, "--train-iters", "1"]
MODEL = [*WITHOUT_DATA, "--mock-data", "--tokenizer-type", "NullTokenizer"]
CONFIGS = {
    "wrong.yaml": "name: wrong\nflags:\n  model:\n    num-layers: 4\n    num-layers: 8\n",
    "typo.yaml": "data:\n  prefix: data/corpus\n  pythonstdlib: true\n",
    "not.yaml": "flags:\n  model: {num-layers: 4\n",
}
UNKNOWN_KEY = "error: data.pythonstdlib = True: is not an option of scripts/prepare_data.py. Known here: prefix, "
CASES = {
    "unknown flag": (
        [*MODEL, "--vocab-size", "128", "--num-expert", "8"],
        "error: command line = '--num-expert': is not a flag of Megatron or of smartmoe. "
        "Did you mean --num-experts or --smartmoe-experts or --num-layers?",
    ),
    "configuration": (
        ["--config", "wrong.yaml"],
        "error: wrong.yaml:5 = 'num-layers': is given twice. Remove one of the two lines.",
    ),
    "not YAML": (
        ["--config", "not.yaml"],
        "error: not.yaml:2 = '  model: {num-layers: 4': is not YAML: expected ',' or '}', but got "
        "'<stream end>'. Correct line 2.",
    ),
    "run directory": (
        [*MODEL, "--vocab-size", "128", "--run-dir", "wrong.yaml"],
        "error: --run-dir = 'wrong.yaml': File exists. Pass another directory.",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    for name, text in CONFIGS.items():
        (path / name).write_text(text)
    return path


TRACE = """
import os, sys
from pathlib import Path
if "megatron_smartmoe.adapter.launch.torchrun" in sys.orig_argv:
    Path(__file__).with_name("started").touch()
    os._exit(9)
"""


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """What a torchrun leaves here instead of running, if one is started."""
    (tmp_path / "sitecustomize.py").write_text(TRACE)  # Python imports it when it starts
    return tmp_path / "started"


def launch(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The launcher in `folder`, whose parent is looked through for `sitecustomize`."""
    paths = {"PYTHONPATH": f"{folder.parent}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **paths}
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", *argv]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_stops_the_launcher(name: str, folder: Path, started: Path) -> None:
    argv, error = CASES[name]
    done = launch(folder, *argv)
    assert done.stderr == error + "\n"
    assert done.stdout == ""
    assert done.returncode == 2
    assert_nothing_happened(folder, started)


def assert_nothing_happened(folder: Path, started: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(CONFIGS)
    assert not started.exists()


@pytest.mark.parametrize("how", ["--dry-run", "--run-dir=run"])
def test_an_unknown_key_of_the_data_stops_the_launcher(how: str, folder: Path, started: Path) -> None:
    done = launch(folder, "--config", "typo.yaml", how, *WITHOUT_DATA)
    assert done.stderr.startswith(UNKNOWN_KEY)
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert_nothing_happened(folder, started)
    assert done.stdout == ""


def test_good_input_does_start_torchrun(folder: Path, started: Path) -> None:
    """The trace that the tests above look for does appear."""
    done = launch(folder, *MODEL, "--vocab-size", "128", "--run-dir", "run")
    assert started.exists(), done.stdout + done.stderr
    assert done.returncode == 9
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "command.sh",
        "config.yaml",
        "environment.json",
        "run.lock",
        "train.log",
    ]
