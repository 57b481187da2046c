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
from typing import IO, TextIO

import psutil

from megatron_smartmoe.adapter.launch.watch import Watch, no_watch

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    terminate: Callable[[subprocess.Popen[bytes]], object] = subprocess.Popen.terminate,
    watch: Watch = no_watch,
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
        watch: what watches the ranks meanwhile; its lines go where theirs go.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _become_subreaper()
    output, input_ = os.pipe()
    watching = contextlib.ExitStack()
    table = watching.enter_context(watch(lambda text: os.write(input_, f"smartmoe: {text}\n".encode())))
    child = subprocess.Popen(
        command, env={**os.environ, **environment, **table}, stdout=input_, stderr=subprocess.STDOUT
    )
    signals: list[int] = []  # that ask for the end; an Event's lock could be taken already when a handler interrupts

    def forward_sigterm(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        terminate(child)

    def signal_ranks(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(child.pid).children():
                rank.send_signal(signal.SIGUSR2)

    signal.signal(signal.SIGTERM, forward_sigterm)
    signal.signal(signal.SIGUSR2, signal_ranks)
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    lines = os.fdopen(output, "rb")
    copier = threading.Thread(target=_copy, args=(lines, log, lambda: bool(signals)), daemon=True)
    copier.start()
    status = _wait(child)
    watching.close()
    os.close(input_)
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
        target: a file to append to, opened with the first line, or a descriptor that is open already.
        is_ending: when true, a pipe that nobody reads is waited for half a second and no longer.

    Attributes:
        lost_lines: number of lines since the last one that was written.
        failure: why lines were lost, the last time that any were; empty if none ever was.
    """

    def __init__(self, name: str, target: Path | int, is_ending: Callable[[], bool]) -> None:
        self.name, self.lost_lines, self.failure = name, 0, ""
        self._target, self._is_ending = target, is_ending
        self._at_line_start = True

    def write(self, line: bytes) -> None:
        """Write a line, after a note of those that are missing before it."""
        try:
            if isinstance(self._target, Path):
                self._target = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if self.lost_lines:
                newline = "" if self._at_line_start else "\n"
                self._write_all(self._target, f"{newline}smartmoe: {self.missing}\n".encode())
                self.lost_lines = 0
            self._write_all(self._target, line)
        except OSError as error:
            self.lost_lines += 1
            self.failure = error.strerror or type(error).__name__

    @property
    def missing(self) -> str:
        """How many lines it lost, and why."""
        lines = "1 line is" if self.lost_lines == 1 else f"{self.lost_lines} lines are"
        return f"{lines} missing from {self.name}: {self.failure}"

    def _write_all(self, descriptor: int, data: bytes) -> None:
        """Write in pieces that a pipe takes without blocking once it takes anything (PIPE_BUF, see pipe(7))."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while data:
            while not poll.poll(0 if self.lost_lines else 500):  # ms
                if self._is_ending() or self.lost_lines:
                    raise TimeoutError(errno.ETIMEDOUT, "no program reads it")
            written = os.write(descriptor, data[: select.PIPE_BUF])
            self._at_line_start = data[:written].endswith(b"\n")
            data = data[written:]


def _copy(lines: IO[bytes], log: Path | None, is_ending: Callable[[], bool]) -> None:
    """Copy every line to the log and to the terminal, to the end of `lines` whatever happens to the two."""
    file = None if log is None else _Sink(str(log), log, is_ending)
    if log is not None:
        with contextlib.suppress(OSError):  # the first line fails too then, and that is noted
            log.touch()
    terminal = _standard_sink("the terminal", sys.stdout, is_ending)
    stderr = _standard_sink("stderr", sys.stderr, lambda: True)  # may be the same terminal, or another one
    try:
        for line in lines:
            is_first = [sink is not None and not sink.failure for sink in (file, terminal)]
            for sink in (file, terminal):
                if sink is not None:
                    sink.write(line)
            if file is not None and file.failure and is_first[0]:
                advice = "The run continues, and the file will say how many lines it lacks."
                _note(f"cannot write to {file.name}: {file.failure}. {advice}", terminal)
            if terminal is not None and terminal.failure and is_first[1]:
                where = f"with its output in {log}" if file is not None and not file.lost_lines else "without output"
                advice = f"The run continues {where}; kill {os.getpid()} ends it."
                _note(f"cannot write to {terminal.name}: {terminal.failure}. {advice}", file, stderr)
        if file is not None and file.lost_lines:
            _note(f"{file.missing}.", terminal)
    finally:
        for _ in lines:  # whatever went wrong above: a rank must never wait for this thread
            pass


def _standard_sink(name: str, stream: TextIO | None, is_ending: Callable[[], bool]) -> _Sink | None:
    """A sink for stdout or stderr; None when it is closed."""
    try:
        descriptor = stream.fileno() if stream is not None else None
    except (OSError, ValueError):  # closed since, or replaced by an object without a file
        descriptor = None
    if stream is None or descriptor is None:
        return None
    with contextlib.suppress(OSError):  # then the first line fails too, and that is noted
        stream.flush()  # what the launcher printed comes first
    return _Sink(name, descriptor, is_ending)


def _note(text: str, *sinks: _Sink | None) -> None:
    for sink in sinks:
        if sink is not None and not sink.lost_lines:
            sink.write(f"smartmoe: {text}\n".encode())


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
