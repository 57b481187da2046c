"""Real text and one set of initial weights, shared by the tests that train, of all workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.training import INITIAL_WEIGHTS, losses, train

VOCAB_SIZE = 512


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for all workers of pytest-xdist, filled by the first one that asks for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def prepare(folder: Path) -> None:
    """Text, prepared by the project's own command."""
    script = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
    options = ["--python-stdlib", "--max-bytes", "400000", "--vocab-size", str(VOCAB_SIZE), "--quiet"]
    command = [sys.executable, str(script), *options, "--output-prefix", str(folder / "corpus")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small dataset of real text, in a folder of this worker's, where Megatron writes its indices."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(made_once(tmp_path_factory, "text", prepare), folder, dirs_exist_ok=True)
    prefix = folder / "corpus"
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.tokenizer.model"]
    return ["--data-path", str(prefix), *tokenizer]


@pytest.fixture(scope="session")
def initial_weights(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> list[str]:
    """Flags that start a run from the same weights, whatever its parallelism: a checkpoint of one process.

    Weights that each mix draws for itself would differ, because ranks draw different random numbers.
    """

    def make(folder: Path) -> None:
        saving = ("--save", str(folder / "checkpoint"), "--save-interval", "1")
        train(folder / "run", 1, data_flags, *saving, iterations=1)

    checkpoint = made_once(tmp_path_factory, "initial", make) / "checkpoint"
    return ["--load", str(checkpoint), *INITIAL_WEIGHTS]


@pytest.fixture(scope="session")
def reference_losses(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str], initial_weights: list[str]
) -> list[float]:
    """Losses of the single process, fp32."""

    def make(folder: Path) -> None:
        train(folder, 1, data_flags, *initial_weights, iterations=6)

    return losses(made_once(tmp_path_factory, "reference", make))
