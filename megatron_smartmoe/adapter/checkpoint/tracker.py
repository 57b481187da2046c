"""The tracker file, which names the newest checkpoint: moved on in one step, and only to a checkpoint that is whole.

Megatron opens the file for writing, which empties it, and then writes the number. A job that is killed in between, or a
disk that is full, leaves an empty tracker, and the checkpoints beside it are found no more. Here Megatron gets a buffer
instead. What it writes there is put in place by a rename: at once, or when the manifest has been written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_smartmoe.checkpoint.directory import TRACKER, commit_tracker, prepare_tracker


class AtomicTracker:
    """Stands for the object through which Megatron opens files of checkpoints (`maybe_msc`).

    Args:
        files: that object.

    Attributes:
        is_held: while true, what is written to a tracker is dropped: it will be prepared and committed later.
        failed: called with the error when a tracker cannot be put in force.
    """

    def __init__(self, files: Any, failed: Callable[[OSError], None]) -> None:
        self._files, self.failed = files, failed
        self.is_held = False

    def __getattr__(self, name: str) -> Any:  # called for what is not defined here
        return getattr(self._files, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file as Megatron does; a buffer for writing to a tracker."""
        if "w" in mode and os.path.basename(path) == TRACKER and "://" not in str(path):
            return _Buffer(Path(path).parent, self)
        return self._files.open(path, mode, *args, **kwargs)


class _Buffer(io.StringIO):
    """What Megatron writes to a tracker, put in force when it is closed."""

    def __init__(self, directory: Path, tracker: AtomicTracker) -> None:
        super().__init__()
        self._directory, self._tracker = directory, tracker

    def close(self) -> None:
        """Put it in force, unless trackers are held."""
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        if self._tracker.is_held:
            return
        try:
            prepare_tracker(self._directory, content)
            commit_tracker(self._directory)
        except OSError as error:
            self._tracker.failed(error)
