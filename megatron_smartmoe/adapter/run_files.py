"""Writing the files of a run directory: whole or not at all, and never through a link to somewhere else."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file at once: another process reads the old content or the new one. A link is replaced by the file.

    Args:
        path: the file.
        text: its content.
        mode: permissions, less those that the umask takes away.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def open_to_append(path: Path) -> int:
    """A descriptor to append to a file, which is created if it is not there. A link is replaced by a new file."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    data = (line + "\n").encode()
    descriptor = open_to_append(path)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
            if written < len(data):  # a disk that is full now says so at the next write
                written += os.write(descriptor, data[written:])
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
