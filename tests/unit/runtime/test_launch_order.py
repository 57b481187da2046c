"""Exchanges are launched so that a GPU with one hardware queue overlaps them, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_smartmoe.runtime import chunked_all_to_all
from megatron_smartmoe.runtime.chunked_all_to_all import LaunchOrder, RowExchange
from tests.support.hardware_queue import Operation, Span, run


class _Computed(torch.autograd.Function):
    """Writes down when a chunk is computed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[str], None], index: int, rows: torch.Tensor) -> torch.Tensor:
        ctx.note, ctx.index = note, index
        note(f"compute {index}")
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        ctx.note(f"compute {ctx.index}")
        return None, None, gradient


class _Work:
    def wait(self) -> None:
        pass


def launches(chunks: int, *, held_back: bool) -> tuple[list[str], list[str]]:
    """What a layer of D chunks launches in its forward and in its backward pass; chunk 0 is not exchanged.

    The calls are those of `OverlappedMoELayer`. Each exchange has a size of its own, by which it is recognized.
    """
    launched: list[str] = []

    def all_to_all_single(output: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> _Work:
        kind = "dispatch" if rows.shape[1] == 1 else "combine"
        launched.append(f"{kind} {len(rows)}")
        output.zero_()
        return _Work()

    with mock.patch.object(chunked_all_to_all.dist, "all_to_all_single", all_to_all_single):
        order, group = LaunchOrder() if held_back else None, mock.Mock()
        own = torch.zeros(1, 1, requires_grad=True)
        rows = {index: torch.zeros(index, 1, requires_grad=True) for index in range(1, chunks)}
        dispatches = {index: RowExchange(group, [index], [index], order=order) for index in rows}
        combines = {index: RowExchange(group, [index], [index], order=order, leads=False) for index in rows}
        posted = {index: dispatches[index].start(each) for index, each in rows.items()}
        returning: dict[int, Any] = {}
        outputs = [_Computed.apply(launched.append, 0, own)]
        for index in rows:
            (arrived,) = dispatches[index].finish(*posted[index])
            output = _Computed.apply(launched.append, index, arrived)
            returning[index] = combines[index].start(output.expand(-1, 2))
        outputs += [combines[index].finish(*returning[index])[0] for index in rows]
        forward = launched.copy()
        launched.clear()
        sum(output.sum() for output in outputs).backward()
    return forward, launched


def spans_of(
    launched: list[str], chunks: int, *, exchange_s: float, compute_s: float, backward: bool, one_queue: bool
) -> dict[str, Span]:
    """When the launches run, on two streams, by what each needs."""
    first, second = ("combine", "dispatch") if backward else ("dispatch", "combine")
    needs = {f"compute {index}": (f"{first} {index}",) for index in range(1, chunks)}
    needs |= {f"{second} {index}": (f"compute {index}",) for index in range(1, chunks)}
    operations = [
        Operation(
            name=name,
            stream="compute" if name.startswith("compute") else "wire",
            seconds=compute_s if name.startswith("compute") else exchange_s,
            waits_for=needs.get(name, ()),
        )
        for name in launched
    ]
    return run(operations, one_queue=one_queue)


MIXES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.2, 1.0))  # seconds of an exchange and of a computation


def test_the_order_of_four_chunks() -> None:
    forward, backward = launches(4, held_back=True)
    assert forward == [
        *("dispatch 1", "compute 0", "dispatch 2", "compute 1", "dispatch 3", "compute 2"),
        *("combine 1", "compute 3", "combine 2", "combine 3"),
    ]
    assert backward == [
        *("combine 3", "combine 2", "compute 3", "combine 1", "compute 2", "dispatch 3"),
        *("compute 1", "dispatch 2", "compute 0", "dispatch 1"),
    ]


DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@pytest.mark.parametrize("chunks", [2, 3, 4, 8])
@DIRECTIONS
def test_no_computation_waits_in_the_queue(chunks: int, backward: bool) -> None:
    """It starts when its rows are there and the one before it has ended, whatever was launched before it.

    Where a chunk's two exchanges take longer than its computation, everything waits for the wire in any order.
    """
    launched = launches(chunks, held_back=True)[backward]
    for exchange_s, compute_s in MIXES:
        if 2 * exchange_s > compute_s:
            continue
        spans = spans_of(
            launched, chunks, exchange_s=exchange_s, compute_s=compute_s, backward=backward, one_queue=True
        )
        for index in range(chunks):
            span = spans[f"compute {index}"]
            assert span.start == span.ready, (exchange_s, compute_s, index)


@pytest.mark.parametrize("chunks", [3, 4, 8])
@DIRECTIONS
def test_it_ends_sooner_with_one_queue_and_no_later_with_many(chunks: int, backward: bool) -> None:
    held, at_once = (launches(chunks, held_back=held_back)[backward] for held_back in (True, False))
    assert sorted(held) == sorted(at_once)
    for exchange_s, compute_s in MIXES:
        end = {
            (name, one_queue): max(
                span.end
                for span in spans_of(
                    launched, chunks, exchange_s=exchange_s, compute_s=compute_s, backward=backward, one_queue=one_queue
                ).values()
            )
            for name, launched in (("held", held), ("at once", at_once))
            for one_queue in (True, False)
        }
        assert end["held", True] <= end["at once", True]
        if 2 * exchange_s <= compute_s and not (backward and chunks == 3):  # of two exchanges one is ahead anyway
            assert end["held", True] < end["at once", True]
        assert end["held", False] <= end["at once", False] + 1e-9
