"""Run the ranks: their output goes to the terminal and to the run directory, signals go to them.

Output must be read for as long as a rank is alive, whatever becomes of the places that it is written to: a rank whose
pipe is full waits in `print` for ever, in the middle of training, and so does torchrun when it is asked to end.
Therefore a terminal or a log that cannot be written (`... | head`, a full disk) loses lines, the other one gets a line
that says so, and every further line is tried again.

The end is certain. A rank that dies ends the others within seconds (`torchrun.GRACE_S`), a launcher of another node
that has lost one does the same, and SIGTERM has a time limit, after which everything below this process is killed. The
last line says what happened (`ending.Ending`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

import psutil

from megatron_smartmoe.adapter.launch.deaths import Death, oom_kills, read_death
from megatron_smartmoe.adapter.launch.ending import Ending, as_message
from megatron_smartmoe.adapter.launch.torchrun import END_SIGNAL, GRACE_S, PIPE_VARIABLE
from megatron_smartmoe.adapter.launch.watch import Watch, no_watch
from megatron_smartmoe.adapter.run_files import open_to_append

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ORPHANS_GRACE_S, _SHORT_GRACE_S = 5.0, 2.0  # for what a rank left behind, after a good end and after a death
_MARGIN_S = 3.0  # what torchrun may need beyond its own time limit before it is killed


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    terminate: Callable[[subprocess.Popen[bytes]], object] = lambda child: child.send_signal(END_SIGNAL),
    *,
    ending: Ending | None = None,
    rank: int | None = None,
    limit_s: float = 40.0,
    keep_open: Sequence[int] = (),
    watch: Watch = no_watch,
    stop_note: Path | None = None,
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
        ending: collects deaths and says the last line; None: the command reports its end itself.
        rank: the rank that the command is; None where it is the parent of ranks.
        limit_s: after SIGTERM or Ctrl-C everything is killed when so many seconds have passed.
        keep_open: descriptors that the command inherits.
        watch: what watches the ranks meanwhile; its lines go where theirs go.
        stop_note: where Slurm preempts a job it sends SIGTERM, and SIGKILL after its own time. With a path here the
            first SIGTERM has the ranks save and end, as SIGUSR2 does, and creates this file.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _become_subreaper()
    signals: list[int] = []  # that ask for the end; an Event's lock could be taken already when a handler interrupts
    output = _Output(log, lambda: bool(signals))
    ooms = oom_kills()
    with _error_file(rank) as error_file, watch(output.say) as watched:
        if ending is not None:
            ending.place_of = watched.place_of
        variables = {**os.environ, **environment, **watched.environment}
        if error_file is not None:
            variables["TORCHELASTIC_ERROR_FILE"] = str(error_file)
        child, reports = _start(command, variables, keep_open, with_pipe=ending is not None and rank is None)
        _install_handlers(child, signals, terminate, child_is_rank=rank is not None, stop_note=stop_note)
        assert child.stdout is not None
        threads = [threading.Thread(target=output.copy, args=(child.stdout,), daemon=True)]
        if ending is not None and reports is not None:
            threads.append(threading.Thread(target=_receive, args=(reports, ending, output), daemon=True))
        for thread in threads:
            thread.start()
        status = _wait(child, signals, terminate, ending, limit_s)
        by_request = status in (-signal.SIGTERM, -signal.SIGKILL) and (signals or (ending and ending.others_died()))
        if ending is not None and rank is not None and status and not by_request:
            ending.add(read_death(rank, platform.node(), status, time.time(), error_file, ooms))
        _end_descendants(_SHORT_GRACE_S if ending is not None and ending.deaths else _ORPHANS_GRACE_S)
        for thread in threads:  # the pipes are closed: no process holds their other end any more
            thread.join()
    if ending is not None and (line := ending.line(status, signals, log)):
        output.say(line)
    return 128 - status if status < 0 else status


def _install_handlers(
    child: subprocess.Popen[bytes],
    signals: list[int],
    terminate: Callable[[subprocess.Popen[bytes]], object],
    *,
    child_is_rank: bool,
    stop_note: Path | None,
) -> None:
    is_first = stop_note is not None

    def forward_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal is_first
        if stop_note is not None and is_first:
            is_first = False
            with contextlib.suppress(OSError):  # then the job is not queued again
                stop_note.touch()
            signal_ranks(number, frame)
            return
        signals.append(number)
        terminate(child)

    def signal_ranks(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            for rank in [process] if child_is_rank else process.children():
                rank.send_signal(signal.SIGUSR2)

    signal.signal(signal.SIGTERM, forward_sigterm)
    signal.signal(signal.SIGUSR2, signal_ranks)
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))


@contextlib.contextmanager
def _error_file(rank: int | None) -> Iterator[Path | None]:
    """Where a rank that this process is the parent of leaves its exception; torchrun names one to its own."""
    if rank is None:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="smartmoe-") as folder:
            yield Path(folder) / "error.json"


def _start(
    command: Sequence[str], variables: Mapping[str, str], keep_open: Sequence[int], *, with_pipe: bool
) -> tuple[subprocess.Popen[bytes], IO[bytes] | None]:
    """The child and, if asked for, what it reports through a pipe of its own (see `torchrun`)."""
    pipe = os.pipe() if with_pipe else None
    try:
        child = subprocess.Popen(
            command,
            env={**variables, PIPE_VARIABLE: str(pipe[1])} if pipe else variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[*keep_open, *(pipe[1:] if pipe else ())],
        )
    finally:
        if pipe:
            os.close(pipe[1])
    return child, os.fdopen(pipe[0], "rb") if pipe else None


def _receive(reports: IO[bytes], ending: Ending, output: _Output) -> None:
    """Read the pipe to its end: text for the log, and deaths."""
    for line in reports:
        message = as_message(line)
        if "death" in message:
            ending.add(Death.from_json(message["death"]))
        elif "error" in message:
            ending.error = message["error"]
        else:
            output.log_only(message["log"])


def _wait(
    child: subprocess.Popen[bytes],
    signals: list[int],
    terminate: Callable[[subprocess.Popen[bytes]], object],
    ending: Ending | None,
    limit_s: float,
) -> int:
    """Wait in short turns: Python runs signal handlers between them, also of a signal that came just before a wait.

    Between turns it looks whether the end is due, and sees to it that it comes.
    """
    end_s: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)
        now_s = time.monotonic()
        if end_s is None and ending is not None and ending.deaths:
            end_s = now_s + GRACE_S + _MARGIN_S  # torchrun is ending the others
        elif end_s is None and ending is not None and ending.others_died():
            terminate(child)
            end_s = now_s + GRACE_S
        elif end_s is None and signals:
            end_s = now_s + limit_s
        if end_s is not None and now_s > end_s:
            _kill(child)
            end_s = now_s + _MARGIN_S


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill what is below the child, and then the child."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(child.pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class _Sink:
    """A file or a terminal that loses lines rather than raise, and that notes them when it can be written again.

    Args:
        name: as messages name it.
        target: a file to append to, opened with the first line, or a descriptor that is open already.
        is_ending: when true, a pipe that nobody reads is waited for half a second and no longer.

    Attributes:
        lost_lines: number of lines since the last one that was written.
        failure: why lines were lost, the last time that any were; empty if none ever was.
        is_at_line_start: whether the last line that was written is complete.
    """

    def __init__(self, name: str, target: Path | int, is_ending: Callable[[], bool]) -> None:
        self.name, self.lost_lines, self.failure = name, 0, ""
        self._target, self._is_ending = target, is_ending
        self.is_at_line_start = True
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Write a line, after a note of those that are missing before it."""
        with self._lock:
            self._write(line)

    def _write(self, line: bytes) -> None:
        try:
            if isinstance(self._target, Path):
                self._target = open_to_append(self._target)
            if self.lost_lines:
                newline = "" if self.is_at_line_start else "\n"
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
            self.is_at_line_start = data[:written].endswith(b"\n")
            data = data[written:]


class _Output:
    """The log and the terminal.

    Args:
        log: the file; None for none.
        is_ending: see `_Sink`.
    """

    def __init__(self, log: Path | None, is_ending: Callable[[], bool]) -> None:
        self._file = None if log is None else _Sink(str(log), log, is_ending)
        if log is not None:
            with contextlib.suppress(OSError):  # the first line fails too then, and that is noted
                os.close(open_to_append(log))
        self._terminal = _standard_sink("the terminal", sys.stdout, is_ending)
        self._stderr = _standard_sink("stderr", sys.stderr, lambda: True)  # may be the same terminal, or another one

    def copy(self, lines: IO[bytes]) -> None:
        """Copy every line to the log and to the terminal, to the end of `lines` whatever happens to the two."""
        file, terminal = self._file, self._terminal
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
                    has_log = file is not None and not file.lost_lines
                    where = f"with its output in {file.name}" if file is not None and has_log else "without output"
                    advice = f"The run continues {where}; kill {os.getpid()} ends it."
                    _note(f"cannot write to {terminal.name}: {terminal.failure}. {advice}", file, self._stderr)
            if file is not None and file.lost_lines:
                _note(f"{file.missing}.", terminal)
        finally:
            for _ in lines:  # whatever went wrong above: a rank must never wait for this thread
                pass

    def log_only(self, text: str) -> None:
        """A line that the terminal does not need; it goes there where there is no log."""
        sink = self._file or self._terminal
        if sink is not None:
            sink.write(f"{text}\n".encode())

    def say(self, text: str) -> None:
        """A line of the launcher's own, on a line of its own."""
        _note(text, self._file, self._terminal)


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
            newline = "" if sink.is_at_line_start else "\n"
            sink.write(f"{newline}smartmoe: {text}\n".encode())


def _become_subreaper() -> None:
    """Become the parent of what a killed rank leaves behind (Linux; elsewhere orphans go to init).

    Saving a torch_dist checkpoint starts helper processes. When their rank is killed they live on, hold memory and the
    output pipe, and no other process would ever end them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants(grace_s: float) -> None:
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
