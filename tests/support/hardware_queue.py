"""A GPU with one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), or with as many as there are streams.

Operations are launched in one order. An operation can run when those before it on its stream, and those that it waits
for, have ended. With one queue it is also behind everything that was launched before it: nothing starts before all of
that has started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation on a stream.

    Attributes:
        name: that other operations wait for.
        stream: on which it runs.
        seconds: that it takes.
        waits_for: names of operations that must have ended, apart from those before it on its stream.
    """

    name: str
    stream: str
    seconds: float
    waits_for: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """When an operation could run, by what it needs, and when it ran."""

    ready: float
    start: float
    end: float


def run(operations: Sequence[Operation], *, one_queue: bool) -> dict[str, Span]:
    """When each operation runs, by its name; operations in the order in which they are launched."""
    spans: dict[str, Span] = {}
    free: dict[str, float] = {}
    started = 0.0
    for operation in operations:
        ready = max([free.get(operation.stream, 0.0), *(spans[name].end for name in operation.waits_for)])
        start = max(ready, started) if one_queue else ready
        started = max(started, start)
        spans[operation.name] = Span(ready=ready, start=start, end=start + operation.seconds)
        free[operation.stream] = spans[operation.name].end
    return spans
