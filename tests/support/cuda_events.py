"""CUDA's events where there is no GPU, so that what times a device can be tested: a device that lags behind its host.

An event that was recorded passes when the host has recorded `LAG` more, or waits for the device. Until then `query`
says no and `elapsed_time` raises, as CUDA's do: who reads a time too early fails here too.
"""

from __future__ import annotations

import time
from typing import Any

LAG = 40  # events that the device is behind


class Event:
    """`torch.cuda.Event`, recorded on a device that is late."""

    recorded = passed = 0  # events of the device so far

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed, self._number, self._at_s = enable_timing, 0, 0.0

    def record(self, stream: Any = None) -> None:
        """Queue the event behind what the device has to do."""
        Event.recorded += 1
        Event.passed = max(Event.passed, Event.recorded - LAG)
        self._number, self._at_s = Event.recorded, time.perf_counter()

    def query(self) -> bool:
        """Whether the device is past it."""
        return self._number <= Event.passed

    def synchronize(self) -> None:
        """Wait until the device is past it."""
        Event.passed = max(Event.passed, self._number)

    def wait(self, stream: Any = None) -> None:
        """Program order already holds."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to another.

        Raises:
            RuntimeError: one of them has not been recorded, measures no time, or has not passed.
        """
        for event in (self, end_event):
            if not event._timed or not event._number:
                raise RuntimeError("CUDA error: invalid resource handle")
            if not event.query():
                raise RuntimeError("CUDA error: device not ready")
        return (end_event._at_s - self._at_s) * 1e3


def synchronize(device: Any = None) -> None:
    """`torch.cuda.synchronize`."""
    Event.passed = Event.recorded


def time_steps_with_events() -> None:
    """Have a rank of a training on CPUs time its steps as on a GPU, from here to the end of the process."""
    import torch

    from megatron_smartmoe.adapter.records.account import StepAccount

    started = StepAccount.on_start

    def on_start(account: StepAccount, run: Any) -> None:
        started(account, run)
        account._times._on_gpu = True

    torch.cuda.Event, torch.cuda.synchronize = Event, synchronize  # type: ignore[misc, assignment]
    StepAccount.on_start, StepAccount._basis = on_start, "gpu"  # type: ignore[method-assign, assignment]
