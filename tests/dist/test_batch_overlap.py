"""Megatron's own overlap, of one micro-batch's all-to-alls with another's computation, goes with homes and replicas."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.dist.test_homes import SHUFFLE, decisions
from tests.dist.test_optimizers import BF16_TOLERANCE
from tests.dist.test_replicas import EXACT, HISTORY, MOVING, distance
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.ranks import run_ranks
from tests.support.replicas import balance
from tests.support.training import TINY_MODEL, TINY_TRAINING, delayed_weight_gradients, losses, train

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
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS, TWO_BATCHES, *copies, "--train-iters", "4"]
    late = run_ranks(_late_fetches, 2, [*argv, "--smartmoe-run-dir", str(tmp_path)], log_dir=tmp_path / "ranks")
    assert late == [0, 0]
    found = losses(tmp_path)
    assert distance(found, stock_losses) < BF16_TOLERANCE
    assert sum(map(sum, balance(tmp_path)[-1]["copies"])) > 0


def _late_fetches(argv: list[str]) -> int:
    """Train; how many fetches started only when the experts needed the weights. Forward hooks are skipped here."""
    from megatron_smartmoe.adapter import pretrain
    from megatron_smartmoe.runtime.replicas.slots import ReplicasInUse

    weights, late = ReplicasInUse.weights, []

    def noted(used: ReplicasInUse) -> tuple[torch.Tensor, ...]:
        if used._fetch is None:
            late.append(used)
        return weights(used)

    with mock.patch.object(ReplicasInUse, "weights", noted):
        pretrain.main(argv)
    return len(late)


@pytest.mark.parametrize(("loops", "tolerance"), [(SHUFFLE, 0.0), (MOVING, BF16_TOLERANCE)], ids=["homes", "replicas"])
def test_delayed_weight_gradients(
    loops: list[str], tolerance: float, stock_losses: list[float], tmp_path: Path, data_flags: list[str]
) -> None:
    """`--delay-wgrad-compute`; here only experts delay."""
    overlapped = ["--overlap-grad-reduce", "--use-distributed-optimizer", TWO_BATCHES]
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS, *overlapped, *loops, "--train-iters", "4"]
    run_ranks(_train_delaying, 2, [*argv, "--smartmoe-run-dir", str(tmp_path)], log_dir=tmp_path / "ranks")
    assert distance(losses(tmp_path), stock_losses) <= tolerance


def _train_delaying(argv: list[str]) -> None:
    from megatron_smartmoe.adapter import pretrain
    from megatron_smartmoe.adapter.moe.delayed_gradients import DelayedGradients

    compute, calls = DelayedGradients.compute, []

    def counted(delayed: DelayedGradients) -> None:
        calls.append(len(delayed._pending))
        compute(delayed)

    with delayed_weight_gradients(), mock.patch.object(DelayedGradients, "compute", counted):
        pretrain.main(argv)
    assert calls == [2] * (4 * 4 * 2)  # layers, iterations and micro-batches; two weights each
