"""torchrun, with an eye on the ranks: `python -m megatron_smartmoe.adapter.launch.torchrun [torchrun's options]`.

torch's own program, called as a function, with three differences that matter when a rank dies:

- Each rank is waited for in a thread, so the order in which ranks died is known, and the first one is the cause.
  torchrun looks ten times a second, and of the deaths between two looks it takes any.
- The other ranks have `GRACE_S` seconds to end after torchrun's SIGTERM, where torchrun waits for 30: a rank that has a
  handler for SIGTERM (--exit-signal-handler) cannot run it while it waits for a message of the rank that died.
- torchrun's own output, which says none of this in its 35 lines, goes to the launcher's log and not to the terminal.

The launcher names a pipe in `PIPE_VARIABLE`. Every line in it is a JSON object: `{"death": ...}`, `{"log": "text"}`, or
`{"error": "text"}` for a failure of torchrun itself. Without a pipe (a command that is run by
hand) all goes to stderr, and the first cause is the last line.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_smartmoe.adapter.launch.deaths import Death, first_cause, oom_kills, read_death

PIPE_VARIABLE = "SMARTMOE_LAUNCHER_PIPE"  # number of an open descriptor
GRACE_S = 4.0
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_JOIN_S = 1.0
_LOOK_S = 0.02  # between looks for ranks that have just been started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks of this host; returns the exit status of the first cause, 128 + N for signal N."""
    end_with_parent()
    terminal, report = sys.stderr, Report.to_launcher()
    sys.stderr = report  # before torch is imported: its loggers keep the stream that they find
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    with contextlib.redirect_stderr(terminal):  # wrong options are the user's to see
        options = parse_args(argv)  # type: ignore[no-untyped-call]
    watch = Watch(report)
    watch.start()
    with tempfile.TemporaryDirectory(prefix="smartmoe-") as folder:  # torchrun would leave one of its own behind
        options.log_dir = options.log_dir or folder
        try:
            run(options)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            watch.finish({f.pid: (rank, f.exitcode, f.error_file) for rank, f in error.failures.items()})
            if not any(death.is_refusal for death in watch.deaths):  # wrong flags: the one line says all
                report.write(f"{error}\n")
        except SignalException as error:
            return 128 + error.sigval
        except Exception as error:  # before there was a rank: no address, no port, no answer from another node
            report.write(traceback.format_exc())
            report.failed(f"{type(error).__name__}: {error}")
            return 1
    cause = first_cause(watch.deaths)
    if cause is not None and not report.has_launcher:
        print(f"smartmoe: {cause}", file=terminal, flush=True)
    return 0 if cause is None else cause.exit_status


def end_with_parent() -> None:
    """Receive SIGTERM when the launcher is killed (Linux), so that the ranks do not outlive it."""
    if sys.platform == "linux" and PIPE_VARIABLE in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Report(io.TextIOBase):
    """Where torchrun's text and the deaths go: the launcher's pipe, else stderr. A stream, as loggers want one."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor, self._rest, self._lock = descriptor, "", threading.Lock()

    @classmethod
    def to_launcher(cls) -> Report:
        """The pipe that the environment names; the ranks do not inherit it."""
        number = os.environ.pop(PIPE_VARIABLE, None)
        if number is not None:
            os.set_inheritable(int(number), False)
        return cls(None if number is None else int(number))

    @property
    def has_launcher(self) -> bool:
        """Whether a launcher reads this, and says what has to be said."""
        return self._descriptor is not None

    def write(self, text: str) -> int:
        """Text for the log, line by line."""
        if self._descriptor is None:
            return sys.__stderr__.write(text) if sys.__stderr__ is not None else len(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._send({"log": line})
        return len(text)

    def death(self, death: Death) -> None:
        """One rank that died."""
        if self._descriptor is not None:
            with self._lock:
                self._send({"death": death.to_json()})

    def failed(self, error: str) -> None:
        """torchrun itself failed."""
        if self._descriptor is not None:
            with self._lock:
                self._send({"error": " ".join(error.split())})

    def _send(self, content: dict[str, Any]) -> None:
        data = (json.dumps(content) + "\n").encode()
        with contextlib.suppress(OSError):  # the launcher is gone; the ranks are being ended for that reason
            while data and self._descriptor is not None:
                data = data[os.write(self._descriptor, data) :]


class Watch:
    """Waits for every rank in a thread of its own, and ends the others when one has failed.

    Attributes:
        deaths: of the ranks that ended before their time; not of those that were ended because another one failed.
    """

    def __init__(self, report: Report) -> None:
        self.deaths: list[Death] = []
        self._report, self._host, self._ooms = report, platform.node(), oom_kills()
        self._lock = threading.Lock()
        self._threads: dict[int, threading.Thread] = {}
        self._killed: set[int] = set()

    def start(self) -> None:
        """Look for ranks from now on."""
        threading.Thread(target=self._find, daemon=True).start()

    def finish(self, failures: dict[int, tuple[int, int, str]]) -> None:
        """Add what torchrun saw and this class did not: a rank that died before its thread had started.

        Args:
            failures: process -> rank, exit status and error file.
        """
        for thread in list(self._threads.values()):
            thread.join(_JOIN_S)
        with self._lock:
            known = {death.rank for death in self.deaths}
        for pid, (rank, status, error_file) in failures.items():
            if rank not in known:
                self._died(pid, rank, status, Path(error_file))

    def _find(self) -> None:
        """Start a thread for each child that is a rank. torchrun starts all of them at about the same time."""
        expected = 1
        while True:
            for child in psutil.Process().children():
                if child.pid not in self._threads:
                    with contextlib.suppress(psutil.Error):
                        environ = child.environ()
                        if _ERROR_FILE in environ:  # after exec: before, it still has this process's variables
                            self._wait_for(child.pid, int(environ["RANK"]), Path(environ[_ERROR_FILE]))
                            expected = int(environ["LOCAL_WORLD_SIZE"])
            time.sleep(_LOOK_S if len(self._threads) < expected else 1.0)

    def _wait_for(self, pid: int, rank: int, error_file: Path) -> None:
        def wait() -> None:
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # torchrun is still to collect it
            except ChildProcessError:
                return  # torchrun was faster; see `finish`
            if ended is not None:
                status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                if status:
                    self._died(pid, rank, status, error_file)

        self._threads[pid] = threading.Thread(target=wait, daemon=True)
        self._threads[pid].start()

    def _died(self, pid: int, rank: int, status: int, error_file: Path) -> None:
        ended_s = time.time()
        with self._lock:
            if pid in self._killed or (self.deaths and status == -signal.SIGTERM):
                return  # ended because another one had failed
            death = read_death(rank, self._host, status, ended_s, error_file, self._ooms)
            self.deaths.append(death)
            is_first = len(self.deaths) == 1
        self._report.death(death)
        if is_first:
            timer = threading.Timer(GRACE_S, self._kill_the_others)
            timer.daemon = True
            timer.start()

    def _kill_the_others(self) -> None:
        for pid, thread in self._threads.items():
            if thread.is_alive():  # so this process is alive, or torchrun has not collected it yet
                self._killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # torchrun gives each rank a session of its own


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the ordinary end takes torch another 3 s, in which the launcher would wait
