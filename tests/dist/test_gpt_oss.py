"""gpt-oss's experts: biases, a clamped quick GELU with a gate and an offset; as Megatron's own, and they move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dist.test_homes import SHUFFLE, decisions
from tests.dist.test_replicas import MOVING, TOLERANCE
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.replicas import balance, distance
from tests.support.training import train

pytestmark = pytest.mark.dist

ITERATIONS, SAVED = 6, 4
MODEL = f"{EP2} --num-layers 2 --global-batch-size 2 --weight-decay 0.1 --lr 1e-2".split()
GPT_OSS = "--quick-geglu --activation-func-clamp-value 7.0 --glu-linear-offset 1.0".split()
WITHOUT = ("--swiglu", "--disable-bias-linear")

Training = Callable[..., list[float]]


@pytest.fixture(scope="module")
def gpt_oss(data_flags: list[str]) -> Training:
    """Trains gpt-oss's kind of model on two ranks, in the run directory given, with more flags."""

    def run(run_dir: Path, *flags: str) -> list[float]:
        everything = [*MODEL, *GPT_OSS, *UNCLIPPED, *flags]
        return train(run_dir, 2, data_flags, *everything, iterations=ITERATIONS, without=WITHOUT)

    return run


@pytest.fixture(scope="module")
def stock(gpt_oss: Training, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of Megatron's own experts."""
    return gpt_oss(tmp_path_factory.mktemp("stock"))


def test_homes_move_bit_for_bit(gpt_oss: Training, stock: list[float], tmp_path: Path) -> None:
    """Biases move with their optimizer state, and are saved under Megatron's keys."""
    save = ["--save", str(tmp_path / "saved"), "--save-interval", str(SAVED)]
    assert gpt_oss(tmp_path / "moved", *SHUFFLE, *save) == stock
    assert len(decisions(tmp_path / "moved")) == ITERATIONS // 2 - 1
    assert stock[-1] < stock[0] - 0.05
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    assert gpt_oss(tmp_path / "resumed", "--load", str(tmp_path / "saved")) == stock[SAVED:]


def test_replicas_change_no_loss(gpt_oss: Training, stock: list[float], tmp_path: Path) -> None:
    found = gpt_oss(tmp_path, *MOVING, "--smartmoe-replicas", "history")
    assert distance(found, stock) < TOLERANCE
    assert np.sum(balance(tmp_path)[-1]["copies"]) > 0
