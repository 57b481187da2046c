"""Run the ranks: their output goes to the terminal and to the run directory, signals go to them.

Output must be read for as long as a rank is alive, whatever becomes of the places that it is written to: a rank whose
pipe is full waits in `print` for ever, in the middle of training, and so does torchrun when it is asked to end.
Therefore a terminal or a log that cannot be written (`... | head`, a full disk) loses lines, the other one gets a line
that says so, and every further line is tried again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    terminate: Callable[[subprocess.Popen[bytes]], object] = subprocess.Popen.terminate,
) -> int:
    """Run `command` to its end and return its exit status (128 + N when signal N ended it).

    SIGTERM is forwarded; torchrun ends the ranks 30 s after it, which is less than a large checkpoint takes. SIGUSR2
    is sent to the ranks themselves and not to torchrun, which starts with it ignored: their
    `--exit-signal-handler --exit-signal SIGUSR2` then has all the time it needs. Ctrl-C reaches the ranks through the
    terminal; here it only must not end the launcher before them.

    Args:
        command: the program and its arguments.
        environment: added to this process's own.
        log: where to append the output, besides the terminal; None: only the terminal.
        terminate: how SIGTERM is forwarded.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _become_subreaper()
    child = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    is_ending = threading.Event()

    def forward_sigterm(number: int, frame: FrameType | None) -> None:
        is_ending.set()
        terminate(child)

    def signal_ranks(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(child.pid).children():
                rank.send_signal(signal.SIGUSR2)

    signal.signal(signal.SIGTERM, forward_sigterm)
    signal.signal(signal.SIGUSR2, signal_ranks)
    signal.signal(signal.SIGINT, lambda number, frame: is_ending.set())
    assert child.stdout is not None
    copier = threading.Thread(target=_copy, args=(child.stdout, log, is_ending), daemon=True)
    copier.start()
    status = _wait(child)
    _end_descendants()
    copier.join()  # the pipe is closed: no process holds its other end any more
    return 128 - status if status < 0 else status


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait in short turns: Python runs signal handlers between them, also of a signal that came just before a wait."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)


class _Sink:
    """A file or a terminal that loses lines rather than raise, and that notes them when it can be written again.

    Args:
        name: as messages name it.
        advice: what a reader of the other sinks does about lost lines.
        is_ending: once this is set, a pipe that nobody reads is waited for half a second and no longer.
        path: of a file to append to, opened with the first line; None for `descriptor`.
        descriptor: what is open already.

    Attributes:
        lost_lines: number of lines since the last one that was written.
        failure: why lines were lost, the last time that any were.
    """

    def __init__(
        self,
        name: str,
        advice: str,
        is_ending: threading.Event,
        *,
        path: Path | None = None,
        descriptor: int | None = None,
    ) -> None:
        self.name, self.advice, self.lost_lines, self.failure = name, advice, 0, ""
        self._path, self._descriptor, self._is_ending = path, descriptor, is_ending
        self._at_line_start = True

    def write(self, line: bytes) -> None:
        """Write a line, after a note of those that are missing before it."""
        try:
            if self._descriptor is None:
                assert self._path is not None
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if self.lost_lines:
                newline = "" if self._at_line_start else "\n"
                self._write_all(f"{newline}smartmoe: {self.missing}\n".encode())
                self.lost_lines = 0
            self._write_all(line)
        except OSError as error:
            self.lost_lines += 1
            self.failure = error.strerror or type(error).__name__

    @property
    def missing(self) -> str:
        """How many lines it lost, and why."""
        lines = "1 line is" if self.lost_lines == 1 else f"{self.lost_lines} lines are"
        return f"{lines} missing from {self.name}: {self.failure}"

    def _write_all(self, data: bytes) -> None:
        """Write in pieces that a pipe takes without blocking once it takes anything (PIPE_BUF, see pipe(7))."""
        assert self._descriptor is not None
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while data:
            while not poll.poll(0 if self.lost_lines else 500):  # ms
                if self._is_ending.is_set() or self.lost_lines:
                    raise TimeoutError(errno.ETIMEDOUT, "no program reads it")
            written = os.write(self._descriptor, data[: select.PIPE_BUF])
            self._at_line_start = data[:written].endswith(b"\n")
            data = data[written:]


def _copy(lines: IO[bytes], log: Path | None, is_ending: threading.Event) -> None:
    """Copy every line to the log and to the terminal, to the end of `lines` whatever happens to the two.

    The first time that one of them fails, the other says so (of a terminal also stderr, which may be another one), and
    at the end the terminal says what the log lacks.
    """
    sinks, terminal, stderr = [], None, None
    if log is not None:
        advice = "The run continues, and the file will say how many lines it lacks."
        sinks.append(_Sink(str(log), advice, is_ending, path=log))
    if sys.stdout is not None:  # None: it was closed when this program started
        with contextlib.suppress(OSError):
            sys.stdout.flush()  # what the launcher printed comes first
        where = f"with its output in {log}" if log is not None else "without output"
        advice = f"The run continues {where}; kill {os.getpid()} ends it."
        terminal = _Sink("the terminal", advice, is_ending, descriptor=sys.stdout.fileno())
        sinks.append(terminal)
    if sys.stderr is not None:
        never_wait = threading.Event()
        never_wait.set()
        stderr = _Sink("stderr", "", never_wait, descriptor=sys.stderr.fileno())
    announced: set[str] = set()
    for line in lines:
        for sink in sinks:
            sink.write(line)
        for sink in sinks:
            if sink.lost_lines and sink.name not in announced:
                announced.add(sink.name)
                notice = f"smartmoe: cannot write to {sink.name}: {sink.failure}. {sink.advice}\n".encode()
                for other in (*sinks, stderr):
                    if other is not None and not other.lost_lines and (other is not stderr or sink is terminal):
                        other.write(notice)
    if terminal is not None and not terminal.lost_lines and sinks[0].lost_lines:
        terminal.write(f"smartmoe: {sinks[0].missing}.\n".encode())


def _become_subreaper() -> None:
    """Become the parent of what a killed rank leaves behind (Linux; elsewhere orphans go to init).

    Saving a torch_dist checkpoint starts helper processes. When their rank is killed they live on, hold memory and the
    output pipe, and no other process would ever end them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants(grace_s: float = 5.0) -> None:
    """End what is left of the ranks: by SIGTERM, and after `grace_s` by SIGKILL."""
    orphans = psutil.Process().children(recursive=True)
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.terminate()
    still_running = psutil.wait_procs(orphans, timeout=grace_s)[1]
    for orphan in still_running:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(still_running, timeout=grace_s)
