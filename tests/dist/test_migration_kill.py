"""kill -9 of one rank in the middle of a migration: the next run resumes from the checkpoint with the same losses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.dist.test_homes import SHUFFLE
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, train

pytestmark = pytest.mark.dist

ITERATIONS = 8
FLAGS = [*EP2.split(), *UNCLIPPED, *SHUFFLE, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
DIES_AFTER = 4  # iterations: the first migration is done by then, and the checkpoint of iteration 3


def train_and_die(argv: list[str], point: str, victim: int) -> None:
    """Train until a migration reaches `point` (see ExpertExchange), where the victim kills itself."""
    from megatron_smartmoe.adapter.pretrain import choose_device, main
    from megatron_smartmoe.runtime.migration.exchange import ExpertExchange

    choose_device("cpu")
    from megatron.training import get_args

    def probe(reached: str, step: Any, chunk: Any) -> None:
        if reached == point and get_args().curr_iteration >= DIES_AFTER and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)

    made = ExpertExchange.__init__
    ExpertExchange.__init__ = lambda self, **kwargs: made(self, **kwargs, probe=probe)  # type: ignore[method-assign]
    main(argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> list[float]:
    return train(tmp_path_factory.mktemp("whole"), 2, data_flags, *FLAGS, iterations=ITERATIONS)


@pytest.mark.parametrize(("point", "victim"), [("received", 0), ("staged", 1), ("agreed", 0), ("committed", 1)])
def test_the_next_run_goes_on_exactly(
    point: str, victim: int, tmp_path: Path, data_flags: list[str], whole: list[float]
) -> None:
    saving = ["--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved"), "--save-interval", "3"]
    flags = [*data_flags, *FLAGS, *saving]
    argv = [*TINY_MODEL, *TINY_TRAINING, *flags, "--train-iters", str(ITERATIONS)]
    with pytest.raises(AssertionError, match=f"rank{victim} failed|rank{1 - victim} failed"):
        run_ranks(train_and_die, 2, argv, point, victim, log_dir=tmp_path / "died")
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert train(tmp_path / "resumed", 2, flags, iterations=ITERATIONS) == whole[3:]
