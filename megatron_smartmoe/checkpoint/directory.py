"""A directory of checkpoints: the iterations that it holds, and the one in force.

Megatron writes `iter_0000100/` and then the number 100 to the tracker, `latest_checkpointed_iteration.txt`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
RELEASE = "release"  # in the tracker and as a folder: weights without an iteration, as Megatron's converters write them
_NEXT = f".{TRACKER}.next"
_LISTED = 10  # iterations that a message names


class TrackerError(CheckpointError):
    """A tracker that names no iteration.

    Args:
        place: the tracker.
        content: what it holds.
    """

    def __init__(self, place: str, content: str) -> None:
        self.content = content
        super().__init__(place, "does not hold the number of an iteration", repr(content[:100]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the two parts."""
        return type(self), (self.place, self.content)


def iterations(directory: Path) -> tuple[int, ...]:
    """Iterations that have a folder, newest first."""
    names = (path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir())
    return tuple(sorted((int(name) for name in names if name.isascii() and name.isdecimal()), reverse=True))


def folder_of(directory: Path, iteration: int) -> Path:
    """The folder of an iteration, as Megatron names it."""
    return directory / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration of a folder; None if its name is no iteration's."""
    name = folder.name.removeprefix("iter_")
    return int(name) if folder.name != name and name.isascii() and name.isdecimal() else None


def read_tracker(directory: Path) -> int | str | None:
    """The iteration that the tracker names, or RELEASE; None without a tracker.

    Raises:
        TrackerError: it names neither.
        CheckpointError: it cannot be read.
    """
    path = directory / TRACKER
    try:
        with path.open("rb") as file:
            text = file.read(10_000).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(str(path), "cannot be read", error.strerror or "") from None
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise TrackerError(str(path), text)
    return int(text)


def prepare_tracker(directory: Path, content: str) -> None:
    """Write the next tracker beside the one in force, so that nothing but a rename is left to do.

    Raises:
        OSError: it cannot be written; the one in force is as it was.
    """
    path = directory / _NEXT
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def commit_tracker(directory: Path) -> None:
    """Put the prepared tracker in force.

    Raises:
        OSError: it cannot be; the one before is still in force.
    """
    (directory / _NEXT).replace(directory / TRACKER)


def write_tracker(directory: Path, iteration: int) -> None:
    """Make an iteration the one in force, in one step.

    Raises:
        OSError: it cannot be written; the one before is still in force.
    """
    prepare_tracker(directory, str(iteration))
    commit_tracker(directory)


def listed(numbers: Collection[int]) -> str:
    """Iterations in a message."""
    shown = ", ".join(map(str, list(numbers)[:_LISTED]))
    return shown + (f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else "")
