"""Scores of one router for the next one (MoE++, eq. 6), whatever lies between two layers: activation checkpoints too.

A layer that is recomputed is called with its input alone, and before the layer in front of it is recomputed. So the
scores travel beside the graph, and so do their slopes: the next router takes scores as they are and leaves the slope
of the loss with respect to them in its backward pass; the router that they are from adds it to its own. The next
router's input goes through the same node as the scores, so that no slope can come late.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_smartmoe.adapter.gates.passes import Passes

_EVALUATION = -1  # in the place of a micro-batch: scores are taken at once, and have no slope


class Scores:
    """What one router has for the next one, by micro-batch."""

    def __init__(self) -> None:
        self._values: dict[int, torch.Tensor] = {}
        self._slopes: dict[int, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget what an iteration that was broken off has left."""
        self._values.clear()
        self._slopes.clear()

    def put(self, number: int, scores: torch.Tensor) -> None:
        """Scores of a micro-batch; not once more where the next router has had its backward pass."""
        if number not in self._slopes:
            self._values[number] = scores.detach()

    def get(self, number: int) -> torch.Tensor:
        """Scores of a micro-batch, which stay: a recomputed layer asks twice."""
        values = self._values.pop(number) if number == _EVALUATION else self._values[number]
        return values.detach()  # another tensor, which autograd may mark

    def leave_slope(self, number: int, slope: torch.Tensor) -> None:
        """The slope of a micro-batch, whose scores nobody asks for any more."""
        self._slopes[number] = slope
        self._values.pop(number, None)

    def take_slope(self, number: int) -> torch.Tensor | None:
        """The slope that the next router has left; None where it has none, as when its scores are not trained."""
        return self._slopes.pop(number, None)


class Link:
    """One router's place in the row of routers.

    Args:
        before: the scores of the router before; None for the first one.
        after: where the next router finds this one's; None for the last one.
    """

    def __init__(self, before: Scores | None, after: Scores | None) -> None:
        self._before, self._after = before, after
        self._passes = Passes()

    def begin(self, num_micro_batches: int) -> None:
        """Start an iteration."""
        self._passes.begin(num_micro_batches)
        if self._after is not None:
            self._after.clear()

    def number(self, *, training: bool) -> int:
        """The micro-batch of this pass; call it once in each."""
        return self._passes.next() if training else _EVALUATION

    def take(self, number: int, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The router's input, which it has to use in place of `input`, and the scores of the one before."""
        if self._before is None:
            return input, None
        taken: tuple[torch.Tensor, torch.Tensor] = _Taken.apply(input, self._before, number)  # type: ignore[no-untyped-call]
        return taken

    def give(self, number: int, scores: torch.Tensor) -> torch.Tensor:
        """Leave scores for the next router; returns what the router has to use in their place."""
        if self._after is None:
            return scores
        given: torch.Tensor = _Given.apply(scores, self._after, number)  # type: ignore[no-untyped-call]
        return given


def linked(num_routers: int) -> list[Link]:
    """The links of routers that follow one another."""
    between = [Scores() for _ in range(num_routers - 1)]
    rows = itertools.pairwise([None, *between, None])
    return [Link(before, after) for before, after in itertools.islice(rows, num_routers)]


class _Taken(torch.autograd.Function):
    """A router's input, and the scores of the one before, whose slope is left for that one."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, scores: Scores, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.scores, ctx.number = scores, number
        return input.view_as(input), scores.get(number)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[torch.Tensor, None, None]:
        of_input, of_scores = slopes
        ctx.scores.leave_slope(ctx.number, of_scores)
        return of_input, None, None


class _Given(torch.autograd.Function):
    """Scores as they are, with the slope that the next router has left for them."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, scores: Scores, number: int) -> torch.Tensor:
        ctx.scores, ctx.number = scores, number
        scores.put(number, values)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[torch.Tensor, None, None]:
        left = ctx.scores.take_slope(ctx.number)
        return slopes[0] if left is None else slopes[0] + left, None, None
