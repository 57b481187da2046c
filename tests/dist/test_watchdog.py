"""The watchdog on real ranks: what is recorded, that losses do not change, and slow ranks; faults: test_stalls.py."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.runtime.progress import VARIABLE, Phase, ProgressTable, RankProgress
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

pytestmark = pytest.mark.dist

EVERYTHING = (
    "--smartmoe --expert-model-parallel-size 2 --smartmoe-spare-slots 1 --smartmoe-replicas exact "
    "--smartmoe-replicas-margin 0 --smartmoe-overlap-degree 2 --smartmoe-homes shuffle --smartmoe-homes-interval 3 "
    "--use-distributed-optimizer --eval-iters 1 --eval-interval 4 --split 90,10,0 --save-interval 4"
).split()
STAGES = ["--smartmoe", "--pipeline-model-parallel-size", "2"]
ITERATIONS = 6


class Watched:
    """A finished training with a table of records that this process holds, as the launcher would."""

    def __init__(self, run_dir: Path, data_flags: list[str], *flags: str) -> None:
        table = ProgressTable(2)
        argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *flags, "--train-iters", str(ITERATIONS)]
        argv += ["--smartmoe-run-dir", str(run_dir)]
        self.counted: list[dict[str, Any]] = run_ranks(_count, 2, argv, table.path, log_dir=run_dir / "ranks")
        self.records: list[RankProgress] = table.read()
        table.close()
        self.losses = losses(run_dir)


def _count(argv: list[str], table: str) -> dict[str, Any]:
    """Train, and return how many operations gloo itself has counted when the training ends."""
    import torch.distributed as dist

    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    counted: dict[str, Any] = {}

    class Count(Callback):
        def on_end(self) -> None:
            groups: Any = dist.distributed_c10d._world.pg_map
            counted["operations"] = sum(group._get_sequence_number_for_group() for group in groups)

    os.environ[VARIABLE] = table
    main(argv, callbacks=[Count()])
    return counted


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Watched:
    run_dir = tmp_path_factory.mktemp("everything")
    return Watched(run_dir, data_flags, *EVERYTHING, "--save", str(run_dir / "checkpoints"))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Watched:
    return Watched(tmp_path_factory.mktemp("stages"), data_flags, *STAGES)


@pytest.fixture(params=["everything", "stages"])
def watched(request: pytest.FixtureRequest) -> Watched:
    watched: Watched = request.getfixturevalue(request.param)
    return watched


def test_every_operation_is_recorded(watched: Watched) -> None:
    """gloo numbers what each group does, collectives and messages, whoever asked for it."""
    assert len(watched.records) == 2
    for rank, counted in zip(watched.records, watched.counted, strict=True):
        assert rank.posted == counted["operations"] > 100


def test_the_record_of_a_finished_rank(watched: Watched) -> None:
    for number, rank in enumerate(watched.records):
        assert (rank.rank, rank.iteration, rank.steps, rank.phase) == (number, ITERATIONS, ITERATIONS, Phase.ENDING)
        assert rank.median_step_s is not None
        assert rank.median_step_s > 0
        assert not rank.is_waiting
        assert rank.waited_s >= 0


def test_groups_have_megatrons_names_and_equal_counts(everything: Watched) -> None:
    first, second = everything.records
    names = {group.name for group in first.groups.values()}
    assert {"all ranks", "expert model parallel group"} <= names
    counts = [{key: group.posted for key, group in rank.groups.items() if group.size == 2} for rank in (first, second)]
    assert counts[0] == counts[1]


def test_losses_are_the_same_bits_without_it(everything: Watched, tmp_path: Path, data_flags: list[str]) -> None:
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *EVERYTHING, "--train-iters", str(ITERATIONS)]
    argv += ["--save", str(tmp_path / "checkpoints"), "--smartmoe-run-dir", str(tmp_path), "--smartmoe-watchdog", "off"]
    run_ranks(_train, 2, argv, log_dir=tmp_path / "ranks")
    assert losses(tmp_path) == everything.losses
    assert len(everything.losses) == ITERATIONS


def _train(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    main(argv)


def test_slow_and_busy_ranks_without_the_launcher(tmp_path: Path, data_flags: list[str]) -> None:
    """Rank 0 watches; both kinds of trouble are named, and training goes on to its end."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--expert-model-parallel-size", "2", "--train-iters", "16"]
    argv += ["--smartmoe-run-dir", str(tmp_path), "--smartmoe-watchdog-floor-s", "2"]
    places = run_ranks(_with_a_slow_rank, 2, argv, log_dir=tmp_path / "ranks")
    log = (tmp_path / "ranks" / "rank0.log").read_text()
    slow = re.search(r" smartmoe: iteration +7 \| WARNING: .*", log)
    assert slow is not None, log[-3000:]
    assert "the slowest rank is 1 of 2" in slow[0]
    assert "it is slow but moves, and training continues" in slow[0]
    busy = re.search(r" smartmoe: iteration +13 \| WARNING: .*", log)
    assert busy is not None, log[-3000:]
    assert "the slowest rank is 1 of 2" in busy[0]
    assert "it is outside the collectives, and 1 rank waits in a collective" in busy[0]
    assert busy[0].endswith(f"its stacks: {tmp_path}/stacks-rank1.txt |")
    assert "in _take_a_nap" in (tmp_path / "stacks-rank1.txt").read_text()
    assert log.count("training continues; it was held up for") == 2
    # The layers, in both passes, seen from inside; layers of the other direction come last in a step.
    assert places[1][:5] == [(1, "FORWARD"), (2, "FORWARD"), (3, "FORWARD"), (4, "FORWARD"), (0, "FORWARD")]
    assert places[1][5:] == [(4, "BACKWARD"), (3, "BACKWARD"), (2, "BACKWARD"), (1, "BACKWARD"), (0, "BACKWARD")]


def _take_a_nap(seconds: float) -> None:
    time.sleep(seconds)


def _with_a_slow_rank(argv: list[str]) -> list[tuple[int, str]]:
    """Returns the places that the layers' own hooks saw in the record, each once, in one micro-batch."""
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.adapter.records import progress
    from megatron_smartmoe.adapter.run import Run
    from megatron_smartmoe.runtime.progress import Pass, Word

    places: list[tuple[int, str]] = []

    class Slow(Callback):
        iteration = 0

        def on_start(self, run: Run) -> None:
            self.is_slow = run.ranks.rank == 1
            watching = progress.ProgressRecorder.of_this_process
            assert watching is not None
            assert watching.record is not None
            words = watching.record.words

            def note() -> None:
                place = (words[Word.LAYER], Pass(words[Word.PASS]).name)
                if self.iteration == 2 and place not in places:
                    places.append(place)

            def forward(*_: Any) -> None:
                note()
                if self.iteration == 7 and self.is_slow:
                    _take_a_nap(0.6)

            def backward(*_: Any) -> None:
                note()

            for _, layer in run.layers:
                layer.register_forward_pre_hook(forward)
                layer.router.weight.register_hook(backward)
            model: Any = run.chunks[0]
            model.output_layer.register_forward_pre_hook(forward)
            model.embedding.word_embeddings.weight.register_hook(backward)

        def before_step(self, iteration: int) -> None:
            self.iteration = iteration
            if iteration == 13 and self.is_slow:
                _take_a_nap(9)

    main(argv, callbacks=[Slow()])
    return places
