"""The dataset appears whole or not at all.

Everything is written under `*.partial` names beside the target, flushed to the disk and renamed; the `.idx`, without
which Megatron sees no dataset, goes last. One preparer works on a prefix at a time, held by a lock that the kernel
drops when the process dies, so that a killed preparer leaves at most partial files, and the next one replaces them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_smartmoe.adapter.corpus.spec import meta_path, read_meta
from megatron_smartmoe.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """The files of one prefix, in the order in which they are put in place; its lock; a folder for unpacked inputs."""

    meta: Path
    tokenizer: Path
    bin: Path
    idx: Path
    lock: Path
    unpacked: Path

    @classmethod
    def of(cls, prefix: Path) -> OutputPaths:
        """Names are appended, not exchanged for a suffix: a prefix may hold dots."""
        return cls(
            meta=meta_path(prefix),
            tokenizer=Path(f"{prefix}.tokenizer.model"),
            bin=Path(f"{prefix}.bin"),
            idx=Path(f"{prefix}.idx"),
            lock=Path(f"{prefix}.lock"),
            unpacked=Path(f"{prefix}.unpacked.partial"),
        )

    def targets(self) -> tuple[Path, ...]:
        """In commit order."""
        return (self.meta, self.tokenizer, self.bin, self.idx)


def partial(path: Path) -> Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(path.name + ".partial")


@contextmanager
def exclusive(paths: OutputPaths) -> Iterator[bool]:
    """Hold the prefix; True if another process held it before. Makes the directory.

    Raises:
        ConfigError: the directory cannot be made or written to.
    """
    try:
        paths.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor, waited = _lock(paths.lock)
    except OSError as error:
        raise ConfigError(
            "--output-prefix",
            str(paths.lock.parent),
            f"cannot write here ({error.strerror})",
            "Give a prefix in a directory that you may write to.",
        ) from error
    try:
        yield waited
    finally:
        paths.lock.unlink(missing_ok=True)  # While it is held: who waits for it sees that it is gone and opens anew.
        os.close(descriptor)


@contextmanager
def partial_files(paths: OutputPaths) -> Iterator[None]:
    """Remove partial files before (a killed preparer's) and after (after a commit there are none)."""
    leftovers = [partial(path) for path in paths.targets()]
    try:
        _remove(leftovers, paths.unpacked)
        yield
    finally:
        _remove(leftovers, paths.unpacked)


def _remove(files: list[Path], folder: Path) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what Ctrl-C cleans up is cleaned up for a scheduler too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Handlers belong to the main thread; whoever runs this in another one has their own.
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_overwrite(paths: OutputPaths, *, writes_tokenizer: bool, force: bool) -> None:
    """Raise ConfigError when committing would destroy a dataset (without `force`) or a file of another kind."""
    if paths.meta.exists() and read_meta(paths.meta) is None:
        raise ConfigError(
            "--output-prefix",
            str(paths.meta),
            "this file exists and is not the metadata of a prepared corpus",
            "Give another prefix, such as data/corpus.",
        )
    # A killed commit leaves metadata of this format beside the other files; files without it are the user's own.
    written = (paths.idx, paths.bin, *([paths.tokenizer] if writes_tokenizer else []))
    stays = [path for path in written if path.exists()]
    if not force and stays and (paths.idx in stays or not paths.meta.exists()):
        raise ConfigError("--output-prefix", str(stays[0]), "exists already", "Give --force to replace it.")


def commit(paths: OutputPaths) -> None:
    """Flush the partial files that are there to the disk and put them in place, the `.idx` last."""
    ready = [path for path in paths.targets() if partial(path).exists()]
    for path in ready:
        _flush(partial(path))
    paths.idx.unlink(missing_ok=True)  # From here to the last rename there is no dataset, rather than a mixed one.
    placed: list[Path] = []
    try:
        for path in ready:
            placed.append(path)
            partial(path).replace(path)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    _flush(paths.idx.parent)


def _lock(path: Path) -> tuple[int, bool]:
    """Take the lock; returns its descriptor and whether somebody else had it."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another process is preparing %s: waiting for it", path.with_suffix(""))
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_open_file(path, descriptor):
                return descriptor, waited
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # Its holder removed the file while we waited; lock the one that has the name now.


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
