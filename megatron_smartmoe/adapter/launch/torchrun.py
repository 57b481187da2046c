"""torchrun, with an eye on the ranks: `python -m megatron_smartmoe.adapter.launch.torchrun [torchrun's options]`.

torch's own program, called as a function, with three differences that matter when a rank dies:

- It is known at once that a rank has died, and which one was the first. torchrun takes times in whole seconds, and says
  nothing before all ranks have ended.
- The other ranks have `GRACE_S` seconds to end after torchrun's SIGTERM, where torchrun waits for 30: a rank that has a
  handler for SIGTERM (--exit-signal-handler) cannot run it while it waits for a message of the rank that died.
- torchrun's own output, which says none of this in its 35 lines, goes to the launcher's log and not to the terminal.

The launcher names a pipe in `PIPE_VARIABLE`. Every line in it is a JSON object: `{"death": ...}`, `{"log": "text"}`, or
`{"error": "text"}` for a failure of torchrun itself. Without a pipe (a command that is run by
hand) all goes to stderr, and the first cause is the last line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_smartmoe.adapter.launch.batch_job import saves_on_sigterm
from megatron_smartmoe.adapter.launch.deaths import Death, first_cause, oom_kills, read_death
from megatron_smartmoe.adapter.orphans import end_with_parent
from megatron_smartmoe.adapter.starting import starting

PIPE_VARIABLE = "SMARTMOE_LAUNCHER_PIPE"  # number of an open descriptor
GRACE_S = 4.0
# What asks this program for the end: SIGTERM, unless that is for the ranks alone.
END_SIGNAL = signal.SIGINT if saves_on_sigterm() else signal.SIGTERM
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_LOOK_S = 0.05  # between two looks; torchrun's own are 0.1 s apart


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks of this host; returns the exit status of the first cause, 128 + N for signal N."""
    if PIPE_VARIABLE in os.environ:  # the launcher may be killed, and the ranks must not outlive it
        end_with_parent(END_SIGNAL)
    terminal, report = sys.stderr, Report.to_launcher()
    sys.stderr = report  # before torch is imported: its loggers keep the stream that they find
    subprocess.Popen = Rank  # type: ignore[misc, assignment]  # likewise: torchrun imports it by name
    with starting():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    with contextlib.redirect_stderr(terminal):  # wrong options are the user's to see
        options = parse_args(argv)  # type: ignore[no-untyped-call]
    if saves_on_sigterm():
        options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # the ranks have it too, and save
    watch = Watch(report)
    watch.start()
    with tempfile.TemporaryDirectory(prefix="smartmoe-") as folder:  # torchrun would leave one of its own behind
        options.log_dir = options.log_dir or folder
        try:
            run(options)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            watch.look()
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


class Rank(subprocess.Popen[bytes]):
    """A process that torchrun starts; of the ranks among them a list is kept.

    An exit status can be collected once, so it has to be read from torchrun's own object, whoever comes first.
    """

    started: ClassVar[list[Rank]] = []

    def __init__(self, args: Any, **options: Any) -> None:
        super().__init__(args, **options)
        self.environ: Mapping[str, str] = options.get("env") or {}
        if _ERROR_FILE in self.environ:
            self.started.append(self)


class Watch:
    """Looks at every rank twenty times a second, and ends the others when one has failed.

    Attributes:
        deaths: of the ranks that ended before their time; not of those that were ended because another one failed.
    """

    def __init__(self, report: Report) -> None:
        self.deaths: list[Death] = []
        self._report, self._host, self._ooms = report, platform.node(), oom_kills()
        self._lock, self._seen, self._killed = threading.Lock(), set[int](), set[int]()

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._look_on, daemon=True).start()

    def look(self) -> None:
        """See which ranks have ended since the last look."""
        with self._lock:
            for rank in Rank.started:
                if rank.pid not in self._seen and (status := rank.poll()) is not None:
                    self._seen.add(rank.pid)
                    if status and rank.pid not in self._killed:
                        self._died(rank, status)

    def _look_on(self) -> None:
        while True:
            self.look()
            time.sleep(_LOOK_S)

    def _died(self, rank: Rank, status: int) -> None:
        if self.deaths and status == -signal.SIGTERM:
            return  # torchrun ended it because another one had failed
        error_file, number = Path(rank.environ[_ERROR_FILE]), int(rank.environ["RANK"])
        death = read_death(number, self._host, status, time.time(), error_file, self._ooms)
        self.deaths.append(death)
        self._report.death(death)
        if len(self.deaths) == 1:
            timer = threading.Timer(GRACE_S, self._kill_the_others)
            timer.daemon = True
            timer.start()

    def _kill_the_others(self) -> None:
        with self._lock:
            for rank in Rank.started:
                if rank.poll() is None:
                    self._killed.add(rank.pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(rank.pid, signal.SIGKILL)  # torchrun gives each rank a session of its own


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the ordinary end takes torch another 3 s, in which the launcher would wait
