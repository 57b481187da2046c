"""The moments of a real run, in their order: what `adapter.hooks` promises to callbacks, seen from inside one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING

pytestmark = pytest.mark.dist
FLAGS = (
    "--train-iters 3 --eval-iters 1 --eval-interval 2 --split 80,10,10 --save-interval 2 --smartmoe "
    "--expert-model-parallel-size 2 --num-layers 2"
).split()


def test_moments_of_a_run(tmp_path: Path, data_flags: list[str]) -> None:
    save = ["--save", str(tmp_path / "checkpoints")]
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS, *save]
    first, second = run_ranks(_record, 2, argv, log_dir=tmp_path / "ranks")
    assert first == second
    start, *moments = first
    assert start == {"layers": [0, 1], "numbers": [0, 1], "ep": 2, "chunks": 1, "reporter": "rank 0 only"}
    step = ["early before", "late before", "early after", "late after"]
    between = ["late enters changes", "early between", "late between", "late leaves changes"]
    validation = ["late enters validation", "late leaves validation", "late validation"]
    save_ = ["early enters save", "late enters save", "late leaves save", "early leaves save"]
    assert [text for text in moments if not text.startswith("early validation")] == [
        *[f"{what} 1" for what in step + between],
        *[f"{what} 2" for what in step],
        *validation,
        *[f"{what} 2" for what in between + save_],
        *[f"{what} 3" for what in step + between],
        *[f"{what} 3" for what in save_],
        *validation,
        "late enters test",
        "late leaves test",
        "late test",
        "late end",
    ]


def _record(argv: list[str]) -> list[Any]:
    from megatron_smartmoe.adapter.hooks import Callback, Order
    from megatron_smartmoe.adapter.pretrain import main

    moments: list[Any] = []

    class Early(Callback):
        order = Order.REPLAY
        name = "early"

        def before_step(self, iteration: int) -> None:
            moments.append(f"{self.name} before {iteration}")

        def after_step(self, iteration: int, losses: Any) -> None:
            assert float(losses["lm loss"]) > 0
            moments.append(f"{self.name} after {iteration}")

        def between_steps(self, iteration: int) -> None:
            moments.append(f"{self.name} between {iteration}")

        @contextlib.contextmanager
        def around_save(self, iteration: int) -> Iterator[None]:
            moments.append(f"{self.name} enters save {iteration}")
            yield
            moments.append(f"{self.name} leaves save {iteration}")

    class Late(Early):
        order = Order.LAST
        name = "late"

        def on_start(self, run: Any) -> None:
            assert [number for number, _ in run.layers] == list(run.layer_numbers)
            assert run.is_reporter == (run.ranks.ep_rank == 0)
            moments.append(
                {
                    "layers": [number for number, _ in run.layers],
                    "numbers": list(run.layer_numbers),
                    "ep": run.ranks.ep_size,
                    "chunks": len(run.chunks),
                    "reporter": "rank 0 only",
                }
            )

        @contextlib.contextmanager
        def around_changes(self, iteration: int) -> Iterator[None]:
            moments.append(f"late enters changes {iteration}")
            yield
            moments.append(f"late leaves changes {iteration}")

        @contextlib.contextmanager
        def around_evaluation(self, split: str) -> Iterator[None]:
            moments.append(f"late enters {split}")
            yield
            moments.append(f"late leaves {split}")

        def after_evaluation(self, split: str, losses: Any) -> None:
            moments.append(f"late {split}")

        def on_end(self) -> None:
            moments.append("late end")

    main(argv, callbacks=[Late(), Early()])
    return moments
