"""Runs that switch their pool setting at every re-evaluation, whatever is predicted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses


def train_switching(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int, settings: list[str]
) -> list[float]:
    """Do what `training.train` does, taking the pool settings of these names in turn, one per re-evaluation."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(_main, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], settings, log_dir=run_dir / "ranks")
    return losses(run_dir)


def _main(argv: list[str], settings: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.runtime.pool.switchboard import PoolVerdict, Switchboard

    turn = iter(settings)

    def evaluate(board: Any, iteration: int, times: Any, predict: Any) -> PoolVerdict:
        seconds = predict()
        assert all(each > 0 for each in seconds.values())
        assert times.step_s > 0
        before, name = board.now, next(turn)
        board.now = next(setting for setting in seconds if setting.key == name)
        return PoolVerdict(setting=board.now, before=before, reason="forced", why="a test wants it")

    with mock.patch.object(Switchboard, "evaluate", evaluate):
        main(argv)
