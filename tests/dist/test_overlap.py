"""`--smartmoe-overlap-degree` changes when rows travel, not what is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.dist.test_parallel_equality import EP2, TP2, largest_difference
from tests.support.marks import some_fast
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, train, two_layers

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5  # relative; 2e-7 is seen: the gradient of an expert is a sum over D pieces instead of one product
ITERATIONS = 4
EP4 = "--expert-model-parallel-size 4 --num-experts 16"  # as many slots as sources would hide a wrong sort
SHARED = (
    f"{TP2} {EP2} --expert-tensor-parallel-size 1 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --moe-shared-expert-intermediate-size 64"
)
STAGES = f"--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 {EP2} --num-experts 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
COPIES = "--smartmoe-spare-slots 1 --smartmoe-replicas-margin 0 --smartmoe-replicas"
CASES = {  # ranks, flags of both, degree, flags of the overlapped run alone
    "EP2": (2, EP2, 2, ""),
    "EP2, full recompute": (2, EP2, 2, RECOMPUTE),
    "EP2, copies by history": (2, EP2, 2, f"{COPIES} history"),
    "EP4, 2 pieces": (4, EP4, 2, ""),
    "EP4, 3 pieces": (4, EP4, 3, ""),
    "EP4, 4 pieces, copies for each micro-batch": (4, EP4, 4, f"{COPIES} exact"),
    "PP2xVPP2xEP2": (4, STAGES, 2, ""),
    "ETP2xEP2, interleaved gates": (
        4,
        f"{TP2} {EP2} --expert-tensor-parallel-size 2 --moe-mlp-glu-interleave-size 16",
        2,
        "",
    ),
    "TP2xEP2xEDP2, overlapped optimizer, shared experts": (4, SHARED, 2, ""),
    "TP2xEP2xEDP2, overlapped optimizer, overlapped shared experts": (4, SHARED, 2, "--moe-shared-expert-overlap"),
}

Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Losses:
    """Runs are compared with several others: each is made once."""

    @functools.cache
    def run(world_size: int, flags: str, degree: int) -> list[float]:
        everything = _flags(flags, degree)
        return train(tmp_path_factory.mktemp("run"), world_size, data_flags, *everything, iterations=ITERATIONS)

    return run


def _flags(flags: str, degree: int | str) -> list[str]:
    ours = f"--smartmoe --smartmoe-homes off --smartmoe-overlap-degree {degree}"
    return [*flags.split(), *two_layers(flags), *ours.split()]


@pytest.mark.parametrize("case", some_fast(CASES, "EP4, 3 pieces"))
def test_losses_are_those_without_overlap(case: str, losses_of: Losses) -> None:
    world_size, flags, degree, more = CASES[case]
    overlapped = losses_of(world_size, f"{flags} {more}", degree)
    assert largest_difference(overlapped, losses_of(world_size, flags, 1)) < TOLERANCE
    assert overlapped[-1] < overlapped[0] - 0.05


def _watched(argv: list[str], log: str) -> list[str]:
    """A run of the entry that returns what this rank's exchanges did, in order: `post 3`, `wait 3`, numbered."""
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.runtime.chunked_all_to_all import RowExchange

    numbers: dict[RowExchange, int] = {}  # holds every exchange, so that none is taken for another
    events: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(exchange: RowExchange, *args: Any) -> Any:
            events.append(f"{name} {numbers.setdefault(exchange, len(numbers))}")
            return call(exchange, *args)

        return note

    for name in ("post", "wait"):
        setattr(RowExchange, f"_{name}", noting(name, getattr(RowExchange, f"_{name}")))
    main(argv)
    return events


def test_a_repeated_run_is_bit_equal_and_all_ranks_post_alike(
    tmp_path: Path, data_flags: list[str], losses_of: Losses
) -> None:
    """Ranks that posted in another order would wait for each other or exchange the wrong rows."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(ITERATIONS), *_flags(EP4, 3)]
    argv += ["--smartmoe-run-dir", str(tmp_path)]
    events, *others = run_ranks(_watched, 4, argv, "log", log_dir=tmp_path / "ranks")
    assert losses(tmp_path) == losses_of(4, f"{EP4} ", 3)
    assert all(other == events for other in others)
    layers, micro_batches, pieces = 2, 1, 2  # a rank's own rows, the first of three pieces, are not sent
    assert len(events) == ITERATIONS * micro_batches * layers * pieces * 2 * 2 * 2  # there, back; post, wait; grads
    first_backward = events[layers * pieces * 4 :][: pieces * 4]
    top = layers * pieces * 2  # exchanges of the forward pass; its last layer comes first
    dispatch, combine = [top - 4, top - 3], [top - 2, top - 1]
    assert first_backward == [
        *(f"post {combine[1]}", f"post {combine[0]}"),
        *(f"wait {combine[1]}", f"post {dispatch[1]}"),
        *(f"wait {combine[0]}", f"post {dispatch[0]}"),
        *(f"wait {dispatch[1]}", f"wait {dispatch[0]}"),
    ]


def _broken(argv: list[str]) -> None:
    """A run in which the second chunk's output is lost."""
    from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
    from megatron_smartmoe.adapter.pretrain import main

    compute, send = OverlappedMoELayer._compute, OverlappedMoELayer._send

    def some(layer: Any, counts_PQS: Any, *rows: Any) -> Any:
        output = compute(layer, counts_PQS, *rows)
        return output if counts_PQS is layer.first else output * 0

    def noting(layer: Any, peers: Any, *args: Any) -> Any:
        chunk = send(layer, peers, *args)
        if chunk.dispatch is None:
            layer.first = chunk.counts_PQS
        return chunk

    with mock.patch.multiple(OverlappedMoELayer, _send=noting, _compute=some):
        main(argv)


def test_a_lost_chunk_is_noticed(tmp_path: Path, data_flags: list[str], losses_of: Losses) -> None:
    """The equality above can fail."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", "2", *_flags(EP2, 2)]
    run_ranks(_broken, 2, [*argv, "--smartmoe-run-dir", str(tmp_path)], log_dir=tmp_path / "ranks")
    assert largest_difference(losses(tmp_path), losses_of(2, EP2, 1)[:2]) > TOLERANCE


def test_auto_prints_its_reason(tmp_path: Path, data_flags: list[str]) -> None:
    """One line, from rank 0, with the prediction of every degree; here, where launches are dear, it cuts nothing."""
    train(tmp_path, 2, data_flags, *_flags(EP2, "auto"), iterations=1)
    lines = [line for line in (tmp_path / "ranks" / "rank0.log").read_text().splitlines() if "overlap degree" in line]
    assert len(lines) == 1
    assert lines[0].startswith("smartmoe: overlap degree 1, the fewest chunks")
    assert "overlap degree" not in (tmp_path / "ranks" / "rank1.log").read_text()
