"""What a rank's process can say for itself: the stacks of its threads; and what the kernel says of one that cannot."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from megatron_smartmoe.runtime.progress import RankProgress, process_state, started_ticks

_ANSWER_S = 1.0  # a process that runs at all prints its stacks in milliseconds
_KERNEL_FILES = ("status", "wchan", "syscall")


def is_same(rank: RankProgress) -> bool:
    """Whether the process that wrote the record still exists."""
    return started_ticks(rank.pid) == rank.started_ticks


def stacks_of(rank: RankProgress) -> str | None:
    """The Python stacks of a rank's threads, which it prints itself; None if it does not answer."""
    if not rank.stack_signal or not is_same(rank) or process_state(rank.pid) in ("T", "t", "Z"):
        return None
    try:
        with open(f"/proc/{rank.pid}/fd/{rank.stack_file}", "rb") as file:
            start = file.seek(0, os.SEEK_END)
            os.kill(rank.pid, rank.stack_signal)
            return _answer(file.fileno(), start) or None
    except OSError:  # it has ended meanwhile
        return None


def _answer(descriptor: int, start: int) -> str:
    """What has been written after `start`, once nothing is added any more."""
    size, deadline = start, time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = os.fstat(descriptor).st_size
        if now == size > start:
            break
        size = now
    return os.pread(descriptor, size - start, start).decode(errors="replace")


def kernel_view(pid: int) -> str:
    """What /proc has of a process."""
    parts = []
    for name in _KERNEL_FILES:
        with contextlib.suppress(OSError):  # it has ended, or the kernel does not show this to us
            parts.append(f"/proc/{pid}/{name}:\n{Path(f'/proc/{pid}/{name}').read_text(errors='replace').rstrip()}")
    return "\n".join(parts)
