"""How a rank died: what its parent saw, what it wrote itself, and which of several deaths was the first cause.

A rank that raises leaves its exception in the error file that torchrun names to it (TORCHELASTIC_ERROR_FILE); of a rank
that a signal ended only the parent knows. When one rank is gone the others fail a moment later, because their
connections to it break or torchrun ends them, so the first death in time is the cause, and a broken connection or a
SIGTERM is one only where nothing else is.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR

_SHOWN_CHARACTERS = 400  # of an exception's line
# What gloo, NCCL and the store raise on a rank whose peer has gone.
_LOST_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket timeout|timed out waiting"
    r"|remote process exited|connectFullMesh|DistNetworkError|recvValue failed",
    re.IGNORECASE,
)
_VMSTAT = Path("/proc/vmstat")
_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


@dataclass(frozen=True, kw_only=True)
class Death:
    """One rank that ended before its time.

    Attributes:
        rank: in the whole job.
        host: where it ran.
        status: as Python's subprocess has it: an exit status, or -N for signal N.
        time_s: of the exception, else of the end (seconds since the epoch, of this host's clock).
        error: the last line of its exception; None if it raised none.
        out_of_memory: whether the kernel ended it because memory ran out.
        place: where it was, as the watchdog's notes have it; None if there are none.
    """

    rank: int
    host: str
    status: int
    time_s: float
    error: str | None = None
    out_of_memory: bool = False
    place: str | None = None

    @property
    def exit_status(self) -> int:
        """The exit status of the job, as a shell has it."""
        return 128 - self.status if self.status < 0 else self.status

    @property
    def is_refusal(self) -> bool:
        """Whether the rank refused its flags: the same command would be refused again."""
        return self.status == EXIT_CONFIG_ERROR

    @property
    def _may_follow(self) -> bool:
        """Whether it is what the death of another rank does to this one: a lost connection, or torchrun's SIGTERM."""
        lost = self.error is not None and _LOST_CONNECTION.search(self.error) is not None
        return lost or self.status == -signal.SIGTERM

    def __str__(self) -> str:
        """Rank, host and cause, as the end of a run's output has them."""
        where = "" if self.place is None else f" | it was in {self.place}"
        return f"rank {self.rank} on {self.host} {self._how()}{where}"

    def _how(self) -> str:
        if self.out_of_memory:
            return "was killed by the kernel because the memory of the host or of its cgroup ran out (SIGKILL)"
        if self.status < 0:
            return f"was killed by {_signal_name(-self.status)}"
        if self.error is not None:
            return f"stopped with {self.error}"
        return f"ended with exit status {self.status}"

    def to_json(self) -> dict[str, Any]:
        """For the file or the pipe that another process reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The reverse of `to_json`."""
        return cls(**content)


def first_cause(deaths: Iterable[Death]) -> Death | None:
    """The death that the others follow from, as far as their times and exceptions show it."""
    return min(deaths, key=lambda death: (death._may_follow, death.time_s), default=None)


def read_death(rank: int, host: str, status: int, ended_s: float, error_file: Path | None, ooms_before: int) -> Death:
    """The death of a process of this host.

    Args:
        rank: in the whole job.
        host: this host's name.
        status: as Python's subprocess has it.
        ended_s: when it ended, seconds since the epoch.
        error_file: where it left its exception, if it raised one.
        ooms_before: `oom_kills()` when it was started.
    """
    error, raised_s = _last_line(error_file) if error_file is not None else (None, None)
    return Death(
        rank=rank,
        host=host,
        status=status,
        time_s=ended_s if status < 0 or raised_s is None else raised_s,
        error=error,
        out_of_memory=status == -signal.SIGKILL and oom_kills() > ooms_before,
    )


def _last_line(error_file: Path) -> tuple[str | None, float | None]:
    """The exception that torch's error handler wrote down, as one line, and when."""
    try:
        content, written_s = json.loads(error_file.read_text(encoding="utf-8")), error_file.stat().st_mtime
        text = content["message"]["message"]
    except (OSError, ValueError, KeyError, TypeError):  # none was written, or only a part of it
        return None, None
    line = " ".join(str(text).split())
    cut = line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."
    return cut, written_s


def oom_kills() -> int:
    """How many processes the kernel has ended because memory ran out: on this host, or in this cgroup."""
    return sum(_counter(path) for path in (_VMSTAT, _CGROUP_EVENTS))


def _counter(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    text = signal.strsignal(number)
    return name if number in (signal.SIGKILL, signal.SIGTERM) or not text else f"{name} ({text.lower()})"
