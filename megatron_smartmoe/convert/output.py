"""Writing a conversion: several files at a time, each as a stream, all of them or nothing.

Everything goes into a folder beside OUT, `OUT.partial`, which becomes OUT in one step at the end. Beside each finished
file lies a record of what is in it; a conversion that was killed, started again with the same source and options, keeps
the files that have one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash
from tqdm import tqdm

from megatron_smartmoe.checkpoint.inspection import readable_bytes
from megatron_smartmoe.checkpoint.manifest import FileEntry
from megatron_smartmoe.errors import ConfigError

PARTIAL = ".partial"
_WORK = ".convert"  # folder of records in the partial output
_PLAN_FILE = "plan.json"
_SPARE_BYTES = 64 * 2**20  # for small files


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: Any, /) -> int:
        """Append bytes."""

    def tell(self) -> int:
        """Bytes so far."""

    def flush(self) -> None:
        """Called by `torch.save`."""


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file to write.

    Attributes:
        name: its path in the output, with `/`.
        size_bytes: about how many bytes it will have.
        write: writes it as a stream, calls its second argument with the numbers' bytes as they are written, and
            returns what the record is to hold.
    """

    name: str
    size_bytes: int
    write: Callable[[Sink, Callable[[int], object]], Any]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that was written.

    Attributes:
        entry: its name, size and checksum.
        record: what its writer returned.
    """

    entry: FileEntry
    record: Any


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: Any, /) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def flush(self) -> None:
        """Nothing: `close` does it."""

    def close(self) -> tuple[int, str]:
        """Have all of it on the disk; returns size and checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._bytes, self._hash.hexdigest()


def check_free(out: Path) -> None:
    """Nothing is at OUT yet.

    Raises:
        ConfigError: something is.
    """
    if out.is_symlink():
        raise ConfigError("OUT", str(out), "is a symbolic link", f"Pass the folder itself: {out.resolve()}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("OUT", str(out), "exists and is not empty", "Pass a folder that does not exist yet.")


def check_space(out: Path, needed_bytes: int) -> None:
    """The disk has room for the output, without what a killed conversion has written of it.

    Raises:
        ConfigError: it has not.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    partial = out.with_name(out.name + PARTIAL)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free
    wanted = needed_bytes + _SPARE_BYTES - there
    if wanted > free:
        rule = f"needs {readable_bytes(wanted)}, and its disk has {readable_bytes(free)} free"
        raise ConfigError("OUT", str(out), rule, "Pass a folder on another disk, or make room.")


@contextmanager
def partial_output(out: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to write into, which becomes OUT when the block ends without an error.

    Args:
        out: the output.
        plan: what is converted and how, as JSON; only a conversion of the same plan is resumed.

    Raises:
        ConfigError: another conversion writes there, or was killed there and is another one.
    """
    partial = out.absolute().with_name(out.name + PARTIAL)
    work = partial / _WORK
    text = json.dumps(dict(plan), sort_keys=True)
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("OUT", str(out), rule, "Pass a folder that you may write to.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("OUT", str(out), "is being written by another conversion", "Wait for it.") from None
        saved = work / _PLAN_FILE
        if saved.is_file() and saved.read_text() != text:
            rule = f"{partial} was left by a conversion of another source or with other options"
            raise ConfigError("OUT", str(out), rule, f"Resume that one, or remove it: rm -r {partial}.")
        saved.write_text(text)
        yield partial
        shutil.rmtree(work)
        if out.is_dir():  # empty, see check_free
            out.rmdir()
        partial.rename(out)
    finally:
        os.close(handle)


def write_files(partial: Path, files: Sequence[OutputFile], workers: int) -> list[Written]:
    """Write files, or take over those that are there already; in the order of `files`."""
    total = sum(file.size_bytes for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", leave=False, disable=None) as bar:

        def one(file: OutputFile) -> Written:
            done = _recorded(partial, file.name)
            if done is not None:
                bar.update(file.size_bytes)
                return done
            return _write(partial, file, bar.update)

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, file) for file in files]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            failed = next((future for future in done if future.exception() is not None), None)
            if failed is not None:
                failed.result()
            return [future.result() for future in futures]


def _write(partial: Path, file: OutputFile, progress: Callable[[int], object]) -> Written:
    path = partial / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    sink = _HashedFile(temporary)
    record = file.write(sink, progress)
    size_bytes, checksum = sink.close()
    temporary.replace(path)
    _record_path(partial, file.name).write_text(json.dumps([size_bytes, checksum, record]))
    return Written(
        entry=FileEntry(name=file.name, size_bytes=size_bytes, checksum=checksum),
        record=json.loads(json.dumps(record)),
    )


def _recorded(partial: Path, name: str) -> Written | None:
    """What the record of a finished file says; None if there is none, or the file is not as it says."""
    try:
        size_bytes, checksum, record = json.loads(_record_path(partial, name).read_text())
        if (partial / name).stat().st_size != size_bytes:
            return None
    except (OSError, ValueError):
        return None
    return Written(entry=FileEntry(name=name, size_bytes=size_bytes, checksum=checksum), record=record)


def _record_path(partial: Path, name: str) -> Path:
    return partial / _WORK / f"{name.replace('/', '__')}.json"
