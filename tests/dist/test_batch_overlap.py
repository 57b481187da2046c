"""Megatron's own overlap, of one micro-batch's all-to-alls with another's computation, goes with homes and replicas."""

from __future__ import annotations

from argparse import Namespace
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
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, train

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


LOOPS = pytest.mark.parametrize(
    ("loops", "tolerance"), [(SHUFFLE, 0.0), (MOVING, BF16_TOLERANCE)], ids=["homes", "replicas"]
)


@LOOPS
def test_delayed_weight_gradients(
    loops: list[str], tolerance: float, stock_losses: list[float], tmp_path: Path, data_flags: list[str]
) -> None:
    """`--delay-wgrad-compute`: Megatron allows it with TransformerEngine's layers only; here only experts delay."""
    found = _losses_delaying("delay_wgrad_compute", [*FLAGS, TWO_BATCHES, *loops], tmp_path, data_flags)
    assert distance(found, stock_losses) <= tolerance


@LOOPS
def test_weight_gradients_beside_the_dispatch(
    loops: list[str], tolerance: float, stock_losses: list[float], tmp_path: Path, data_flags: list[str]
) -> None:
    """`--overlap-dispatch-backward-with-experts-wgrad`: computed in the backward pass of the dispatch.

    Gradients are reduced there, too: Megatron by itself would start that before they are computed.
    """
    option = "overlap_dispatch_backward_with_experts_wgrad"
    found = _losses_delaying(option, [*FLAGS, *loops], tmp_path, data_flags)
    assert distance(found, stock_losses) <= tolerance


def _losses_delaying(option: str, flags: list[str], run_dir: Path, data_flags: list[str]) -> list[float]:
    """Losses of a training with one of the options that delay weight gradients."""
    reduced = ["--overlap-grad-reduce", "--use-distributed-optimizer"]
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *reduced, *flags, "--train-iters", "4"]
    run_ranks(_train_delaying, 2, option, [*argv, "--smartmoe-run-dir", str(run_dir)], log_dir=run_dir / "ranks")
    return losses(run_dir)


def _train_delaying(option: str, argv: list[str]) -> None:
    """Train with the option set after Megatron's validation, which asks for TransformerEngine."""
    from megatron_smartmoe.adapter import pretrain
    from megatron_smartmoe.adapter.moe.delayed_gradients import DelayedGradients

    validated, compute, calls = pretrain.megatron_args, DelayedGradients.compute, []

    def delaying(argv: list[str]) -> Namespace:
        from megatron.core.transformer import transformer_config

        args = validated(argv)
        setattr(args, option, True)
        transformer_config.is_te_min_version = lambda *_: True  # here the model's configuration asks for it, too
        return args

    def counted(delayed: DelayedGradients) -> None:
        calls.append(len(delayed._pending))
        compute(delayed)

    with (
        mock.patch.object(pretrain, "megatron_args", delaying),
        mock.patch.object(DelayedGradients, "compute", counted),
    ):
        pretrain.main(argv)
    assert calls == [2] * (4 * 4 * 2)  # layers, iterations and micro-batches; two weights each
