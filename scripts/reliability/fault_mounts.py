"""A file system of its own for a run that shall find it full or read-only: a small tmpfs, where this user may mount."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.reliability import fault_link
from scripts.reliability.fault_plan import ON_MOUNTS

SIZE = "64m"


@functools.cache
def missing_kinds() -> tuple[str, ...]:
    """The kinds of faults that this machine cannot bring about."""
    with tempfile.TemporaryDirectory() as folder:
        can_mount = _mount(Path(folder))
        if can_mount:
            _unmount(Path(folder))
    return (() if can_mount else ON_MOUNTS) + (() if fault_link.can_cut() else ("cut the link",))


@contextlib.contextmanager
def place_for(folder: Path, *, own_file_system: bool) -> Iterator[Path]:
    """An empty folder, with a file system of its own if asked for."""
    folder.mkdir(parents=True)
    if own_file_system and not _mount(folder):
        raise SystemExit(f"faults: cannot mount a tmpfs on {folder}")
    try:
        yield folder
    finally:
        remove(folder)


def repair(folder: Path) -> None:
    """Make space again, and writing possible."""
    if folder.is_mount():
        subprocess.run(["mount", "-o", f"remount,rw,size={SIZE}", str(folder)], check=True)
        (folder / "filler").unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Take the file system and the folder away."""
    if folder.is_mount():
        _unmount(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:  # no mount program
        return False


def _unmount(folder: Path) -> None:
    for _ in range(100):  # what a killed rank left behind may hold it for a moment
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
