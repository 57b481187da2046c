"""Rounds of a relay are launched so that no computation waits behind them, with one hardware queue or with many."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_smartmoe.runtime.replicas import transfer
from megatron_smartmoe.runtime.replicas.transfer import Round, Transfer
from tests.support.hardware_queue import Operation, Span, run

ROUNDS, POINTS = 3, 6  # of a tree of up to 7 replicas; computations between which a round may be posted


def launched(*, at_once: bool) -> list[str]:
    """What a rank that takes part in every round launches: by the calls of the layer, of `Transfer` as it is."""
    names: list[str] = []
    rounds = [Round(operations=[f"round {number}"]) for number in range(ROUNDS)]  # type: ignore[list-item]
    beside: Any = SimpleNamespace(at_once=at_once, begin=lambda: None, entered=nullcontext, event=lambda: None)

    def post(operations: list[Any]) -> list[Any]:
        names.extend(operations)
        return [SimpleNamespace(wait=lambda: None)]

    with mock.patch.object(transfer.dist, "batch_isend_irecv", post):
        fetch = Transfer("weights", rounds, beside)
        for point in range(POINTS):
            names.append(f"compute {point}")
            fetch.advance()
        fetch.finish()
    names.append("replicas")  # what needs the weights
    return names


def spans(names: list[str], *, round_s: float, one_queue: bool) -> dict[str, Span]:
    """When they run; a round needs the one before it, on its stream, and the last computation needs the last round."""
    operations = [
        Operation(
            name=name,
            stream="wire" if name.startswith("round") else "compute",
            seconds=round_s if name.startswith("round") else 1.0,
            waits_for=(f"round {ROUNDS - 1}",) if name == "replicas" else (),
        )
        for name in names
    ]
    return run(operations, one_queue=one_queue)


def waits(found: dict[str, Span]) -> float:
    """Seconds that computations wait in the queue when they could run."""
    return sum(span.start - span.ready for name, span in found.items() if name.startswith("compute"))


def end(found: dict[str, Span]) -> float:
    """When everything has ended."""
    return max(span.end for span in found.values())


def test_rounds_are_posted_between_computations_or_at_once() -> None:
    held = launched(at_once=False)
    assert held[:6] == ["round 0", "compute 0", "round 1", "compute 1", "round 2", "compute 2"]
    assert launched(at_once=True)[:3] == ["round 0", "round 1", "round 2"]


@pytest.mark.parametrize("round_s", [0.1, 0.5, 1.0])
def test_no_computation_waits_with_one_queue(round_s: float) -> None:
    """A round that takes no longer than what is computed between two points is never in the way."""
    assert waits(spans(launched(at_once=False), round_s=round_s, one_queue=True)) == 0
    assert waits(spans(launched(at_once=True), round_s=round_s, one_queue=True)) > 0
    assert end(spans(launched(at_once=False), round_s=round_s, one_queue=True)) == POINTS + 1  # all of it is hidden


@pytest.mark.parametrize("round_s", [0.1, 1.0, 2.5])
def test_with_many_queues_the_weights_are_there_soonest_at_once(round_s: float) -> None:
    names = {at_once: launched(at_once=at_once) for at_once in (True, False)}
    found = {at_once: spans(names[at_once], round_s=round_s, one_queue=False) for at_once in names}
    assert waits(found[True]) == 0
    assert end(found[True]) <= end(found[False])
    assert found[True][f"round {ROUNDS - 1}"].end == pytest.approx(ROUNDS * round_s)
