"""Run the ranks: their output goes to the terminal and to the run directory, signals go to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
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

    SIGTERM is handed on; torchrun ends the ranks 30 s after it, which is less than a large checkpoint takes. SIGUSR2
    is handed to the ranks themselves, and torchrun, which starts with it ignored, never hears of it: their
    `--exit-signal-handler --exit-signal SIGUSR2` then has all the time it needs. Ctrl-C reaches the ranks through the
    terminal; here it only must not end the launcher before them.

    Args:
        command: the program and its arguments.
        environment: added to this process's own.
        log: where to append the output, besides the terminal; None: only the terminal.
        terminate: how SIGTERM is handed on.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _adopt_orphans()
    child = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def forward(number: int, frame: FrameType | None) -> None:
        terminate(child)

    def ask_ranks(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(child.pid).children():
                rank.send_signal(signal.SIGUSR2)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR2, ask_ranks)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    assert child.stdout is not None
    copier = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
    copier.start()
    status = _wait(child)
    _end_orphans()
    copier.join()  # the pipe is closed: nobody is left to hold it
    return 128 - status if status < 0 else status


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait in short turns: Python runs signal handlers between them, also of a signal that came just before a wait."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)


def _copy(lines: IO[bytes], log: Path | None) -> None:
    with (log or Path(os.devnull)).open("ab") as file:
        for line in lines:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _adopt_orphans() -> None:
    """Become the parent of what a killed rank leaves behind (Linux; elsewhere orphans go to init).

    Saving a torch_dist checkpoint starts helper processes. When their rank is killed they live on, hold memory and the
    output pipe, and nobody would ever end them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans(grace_s: float = 5.0) -> None:
    orphans = psutil.Process().children(recursive=True)
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.terminate()
    deaf = psutil.wait_procs(orphans, timeout=grace_s)[1]
    for orphan in deaf:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(deaf, timeout=grace_s)
