"""Real text and one set of initial weights, shared by the tests that train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import INITIAL_WEIGHTS, train

VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small dataset of real text, prepared by the project's own command."""
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    script = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
    options = ["--python-stdlib", "--max-bytes", "400000", "--vocab-size", str(VOCAB_SIZE), "--quiet"]
    subprocess.run([sys.executable, script, *options, "--output-prefix", prefix], check=True, capture_output=True)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.tokenizer.model"]
    return ["--data-path", str(prefix), *tokenizer]


@pytest.fixture(scope="session")
def initial_weights(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> list[str]:
    """Flags that start a run from the same weights, whatever its parallelism: a checkpoint of one process.

    Weights that each mix draws for itself would differ, because ranks draw different random numbers.
    """
    checkpoint = tmp_path_factory.mktemp("initial") / "checkpoint"
    train(checkpoint.parent / "run", 1, data_flags, "--save", str(checkpoint), "--save-interval", "1", iterations=1)
    return ["--load", str(checkpoint), *INITIAL_WEIGHTS]


@pytest.fixture(scope="session")
def reference_losses(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str], initial_weights: list[str]
) -> list[float]:
    """Losses of the single process, fp32."""
    return train(tmp_path_factory.mktemp("reference"), 1, data_flags, *initial_weights, iterations=6)
