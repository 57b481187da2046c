"""One run at a time in a run directory: a lock that says who has it, and that nobody has to remove by hand.

`run.lock` is locked with flock for as long as the run lives (torchrun's process inherits the descriptor, so a launcher
that is killed does not free it before its ranks are gone). Linux carries flock to the server on NFS, and Lustre, GPFS
and CephFS can, so where it works across nodes nothing else is needed. Where it does not, the record in the file
decides: host, pid and Slurm step of the holder, and a sign of life every `SIGN_OF_LIFE_S` (the file's time, compared
with that of another file of the same server, so that no two clocks are compared).

A holder is gone when its process is (on this host), when Slurm says that its step is over, and otherwise (another host,
no Slurm) when it has given no sign of life for `SILENT_S`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from megatron_smartmoe.errors import ConfigError

FILE = "run.lock"
LOCKED_VARIABLE = "SMARTMOE_RUN_LOCKED"  # the launcher holds the lock for its ranks
SIGN_OF_LIFE_S = 15.0
SILENT_S = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # a file system without flock


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who has a run directory.

    Attributes:
        host, boot: of the launcher; `boot` is another one after a restart of the host.
        pid, started_s: of the launcher's process.
        job: its Slurm job and step, `7.0`; None outside Slurm.
        restart: how often Slurm has queued the job again.
        since: date and time, for people.
        start: outside Slurm, what the launchers of several nodes have in common: address and port of node 0.
    """

    host: str
    boot: str
    pid: int
    started_s: float
    job: str | None
    restart: str
    since: str
    start: str | None = None

    @classmethod
    def this_process(cls, environ: Mapping[str, str] = os.environ, start: str | None = None) -> Self:
        """The holder that this process would be."""
        job = environ.get("SLURM_JOB_ID")
        return cls(
            host=platform.node(),
            boot=_boot_id(),
            pid=os.getpid(),
            started_s=psutil.Process().create_time(),
            job=f"{job}.{environ['SLURM_STEP_ID']}" if job and "SLURM_STEP_ID" in environ else job,
            restart=environ.get("SLURM_RESTART_COUNT", "0"),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            start=start,
        )

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """The record of a lock file; None for an empty or foreign one."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        """For a message."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}, since {self.since}"

    def is_same_start(self, other: Holder) -> bool:
        """Whether both belong to one start of one run: the launchers of its nodes."""
        if self.job is None:
            return self.start is not None and self.start == other.start
        return (self.job, self.restart) == (other.job, other.restart)


class RunLock:
    """The lock of one run directory, held by this process. Use `acquire`.

    Attributes:
        descriptor: of the locked file; a child that inherits it holds the lock too.
        taken_over: the line to print when a holder that is gone had left its record; None otherwise.
    """

    def __init__(self, path: Path, descriptor: int, taken_over: str | None) -> None:
        self.descriptor, self.taken_over = descriptor, taken_over
        self._path = path
        self._stopped = threading.Event()
        threading.Thread(target=self._give_signs_of_life, daemon=True).start()

    @classmethod
    def acquire(cls, directory: Path, start: str | None = None) -> Self:
        """Lock a run directory that exists.

        Args:
            directory: to lock.
            start: see `Holder`.

        Raises:
            ConfigError: another run holds it, or the directory cannot be written.
        """
        path, me = directory / FILE, Holder.this_process(start=start)
        if path.is_symlink():
            path.unlink()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            rule = f"its {FILE} cannot be opened: {error.strerror}"
            raise ConfigError("--run-dir", str(directory), rule, "Pass another directory.") from None
        try:
            is_free = _flock(descriptor)
            before = Holder.from_text(os.pread(descriptor, 10_000, 0).decode(errors="replace"))
            if not is_free or (before is not None and not _is_gone(before, me, path)):
                raise _refusal(directory, before, path)
            record = (json.dumps(asdict(me)) + "\n").encode()
            os.pwrite(descriptor, record, 0)
            os.ftruncate(descriptor, len(record))
        except BaseException:
            os.close(descriptor)
            raise
        line = None if before is None else f"took over the run directory {directory}: its last run ({before}) is gone"
        return cls(path, descriptor, line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Free the directory. The file stays, empty: removing a lock file lets two processes lock two files."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)

    def _give_signs_of_life(self) -> None:
        while not self._stopped.wait(SIGN_OF_LIFE_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def check(directory: Path, start: str | None = None) -> None:
    """Refuse a directory that another run holds, without locking it: before work starts, and on every node.

    Args:
        directory: to look at.
        start: see `Holder`; node 0 of the same start may have locked it already.

    Raises:
        ConfigError: another run holds the directory.
    """
    path, me = directory / FILE, Holder.this_process(start=start)
    try:
        holder = Holder.from_text(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return
    if holder is not None and not holder.is_same_start(me) and not _is_gone(holder, me, path):
        raise _refusal(directory, holder, path)


def _flock(descriptor: int) -> bool:
    """Whether nobody else holds the lock, as far as the file system knows."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_gone(holder: Holder, me: Holder, path: Path) -> bool:
    """Whether the run that wrote the record has ended without releasing the lock."""
    if holder.host == me.host:
        return holder.boot != me.boot or not _is_running(holder)
    if holder.job is not None and (ended := _has_ended(holder, me)) is not None:
        return ended
    return _silent_s(path) > SILENT_S


def _is_running(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started_s) < 1.0
    except psutil.NoSuchProcess:
        return False


def _has_ended(holder: Holder, me: Holder) -> bool | None:
    """Whether Slurm has no such step any more; None where it cannot be asked."""
    assert holder.job is not None
    job, _, step = holder.job.partition(".")
    if me.job is not None and job == me.job.partition(".")[0] and holder.restart != me.restart:
        return True  # the job was queued again
    if shutil.which("squeue") is None:
        return None
    which = ["--steps", holder.job] if step else ["--jobs", job]
    done = subprocess.run(["squeue", "--noheader", *which], capture_output=True, text=True, check=False)
    if done.returncode:
        return True if "Invalid job" in done.stderr else None
    return not done.stdout.strip()


def _silent_s(path: Path) -> float:
    """Seconds since the holder's last sign of life, by the clock of the file system's server."""
    probe = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _refusal(directory: Path, holder: Holder | None, path: Path) -> ConfigError:
    if holder is None:
        return ConfigError("--run-dir", str(directory), "is in use by another run", "Pass another directory.")
    end = f"scancel {holder.job}" if holder.job else f"kill {holder.pid} on {holder.host}"
    way_out = f"Wait for it, end it ({end}), or pass another directory."
    if holder.host != platform.node() and not holder.job:
        way_out += f" If it is gone: try again {SILENT_S:.0f} s after its end."
    return ConfigError("--run-dir", str(directory), f"is in use by another run ({holder})", way_out)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
