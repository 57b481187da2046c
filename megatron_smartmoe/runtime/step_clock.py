"""Where the time of a training step goes: one clock per process that is switched from part to part.

At any moment of a step the clock is in one part, so the parts add up to the step, and none of them is a remainder. Who
enters a part says so where it begins and ends: the MoE layers and the experts by hooks in both passes
(`adapter.records.account`), what moves or plans by `within`.

On CPU ranks the clock reads the CPU time of the thread: waiting costs nothing there, and ranks that share cores do not
slow each other's clocks down. Forward, backward and optimizer all run in the main thread on a CPU. On a GPU it records
an event on the current stream and reads it when the device is synchronised anyway; what the host computes then counts
as far as the device waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_smartmoe.cost.fitted import Part

_STOPPED = -1
Mark = tuple[int, Any]  # the part that begins, and when: a number of seconds or an event


class StepClock:
    """The clock of one process; stopped until somebody starts it."""

    def __init__(self) -> None:
        self._marks: list[Mark] | None = None
        self._part = _STOPPED
        self._now: Callable[[], Any] = time.thread_time

    @property
    def is_running(self) -> bool:
        """Whether a step is being timed at this moment."""
        return self._part != _STOPPED

    def start(self, *, on_gpu: bool) -> None:
        """Begin a step.

        Args:
            on_gpu: whether to time the device's stream, not the thread.
        """
        self._now = _event if on_gpu else time.thread_time
        self._marks = []
        self._switch(Part.OUTSIDE)

    def pause(self) -> None:
        """What follows does not belong to the step."""
        if self._marks is not None:
            self._switch(_STOPPED)

    def resume(self) -> None:
        """What follows belongs to the step again."""
        if self._marks is not None:
            self._switch(Part.OUTSIDE)

    def stop(self) -> list[Mark]:
        """End the step; returns its marks for `seconds_of`, empty if none was begun."""
        self.pause()
        marks, self._marks = self._marks or [], None
        return marks

    def enter(self, part: Part) -> None:
        """A part begins, and the one before it ends."""
        if self._part not in (_STOPPED, part):
            self._switch(part)

    @contextlib.contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """A part inside another one, which goes on afterwards."""
        before = self._part
        if before == _STOPPED:
            yield
            return
        self.enter(part)
        try:
            yield
        finally:
            if self.is_running:
                self.enter(Part(before))

    def _switch(self, part: int) -> None:
        assert self._marks is not None
        self._part = part
        self._marks.append((part, self._now()))


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_of(marks: Sequence[Mark]) -> list[float]:
    """Seconds of each part. On a GPU all events must have passed."""
    seconds = [0.0] * len(Part)
    for (part, begins), (_, ends) in itertools.pairwise(marks):
        if part != _STOPPED:
            seconds[part] += ends - begins if isinstance(begins, float) else begins.elapsed_time(ends) / 1e3
    return seconds


def has_passed(marks: Sequence[Mark]) -> bool:
    """Whether `seconds_of` may be asked: the last event is behind the device, where the clock is one of events."""
    last = marks[-1][1]
    return isinstance(last, float) or bool(last.query())


STEP_CLOCK = StepClock()  # of this process
