"""Megatron's own overlap, of one micro-batch's all-to-alls with another's computation, goes with homes and replicas."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.test_homes import SHUFFLE, decisions
from tests.dist.test_optimizers import BF16_TOLERANCE
from tests.dist.test_replicas import EXACT, HISTORY, distance
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.replicas import balance
from tests.support.training import train

pytestmark = pytest.mark.dist

FLAGS = [*EP2.split(), *UNCLIPPED, "--bf16"]
TWO_BATCHES = "--overlap-moe-expert-parallel-comm"


@pytest.fixture(scope="module")
def stock_losses(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> list[float]:
    return train(tmp_path_factory.mktemp("stock"), 2, data_flags, *FLAGS, iterations=4)


def test_homes_move_bit_for_bit(stock_losses: list[float], tmp_path: Path, data_flags: list[str]) -> None:
    assert train(tmp_path, 2, data_flags, *FLAGS, TWO_BATCHES, *SHUFFLE, iterations=4) == stock_losses
    assert decisions(tmp_path)[0]["taken"]


@pytest.mark.parametrize("copies", [EXACT, HISTORY], ids=["exact", "history"])
def test_replicas_change_no_loss(
    copies: list[str], stock_losses: list[float], tmp_path: Path, data_flags: list[str]
) -> None:
    found = train(tmp_path, 2, data_flags, *FLAGS, TWO_BATCHES, *copies, iterations=4)
    assert distance(found, stock_losses) < BF16_TOLERANCE
    assert sum(map(sum, balance(tmp_path)[-1]["copies"])) > 0
