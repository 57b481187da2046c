"""What runs where a rank's files are written: in the rank, or in a process in the background.

It imports little: it may be a new process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import xxhash

from megatron_smartmoe.adapter.orphans import forked_beside_rank
from megatron_smartmoe.checkpoint.checksum import checksum_of_file

_HANDED_OVER_BYTES = 2**18  # a thread that hashes less costs more than it saves

PART = ".smartmoe_checksums_{rank}.json"  # what the writer hands to its rank
SHARDS = "__{rank}_*.distcp"  # files of one rank in torch_dist


_written: dict[str, tuple[int, str]] = {}  # size and checksum of what this process has written, by path


class HashedWrites:
    """Stands for torch's transforms of a shard's stream: what is written is hashed by a thread at the same time.

    Writing waits for the disk and copies; hashing takes a tenth of that, and needs no second reading of the file.

    Args:
        transforms: torch's own, which Megatron writes through.
        beside: a thread of its own for this file.
    """

    def __init__(self, transforms: Any, beside: Executor) -> None:
        self._transforms, self._beside = transforms, beside
        self._state, self._size_bytes = xxhash.xxh3_128(), 0

    def transform_save_stream(self, item: Any, stream: Any) -> tuple[Any, Any]:
        """The stream for one item, and torch's descriptors of it."""
        inner, descriptors = self._transforms.transform_save_stream(item, stream)
        return _HashedStream(inner, self), descriptors

    def write(self, stream: Any, data: Any) -> Any:
        """Write to a stream; returns what it does. `data` is not needed any more afterwards."""
        with memoryview(data) as view:
            self._size_bytes += view.nbytes
            if view.nbytes < _HANDED_OVER_BYTES:
                self._state.update(view)
                return stream.write(data)
            hashed = self._beside.submit(self._state.update, view)
            try:
                return stream.write(data)
            finally:
                hashed.result()

    def note(self, path: str) -> None:
        """Keep the checksum of the file that has been written, unless something went past this object."""
        with contextlib.suppress(OSError):
            if os.stat(path).st_size == self._size_bytes:
                _written[path] = self._size_bytes, self._state.hexdigest()


class _HashedStream:
    """A stream whose writes go through `HashedWrites`."""

    def __init__(self, stream: Any, writes: HashedWrites) -> None:
        self._stream, self._writes = stream, writes

    def __getattr__(self, name: str) -> Any:  # called for what is not defined here
        return getattr(self._stream, name)

    def write(self, data: Any) -> Any:
        return self._writes.write(self._stream, data)


def hashing(write: Callable[..., Any]) -> Callable[..., Any]:
    """Around the function that writes one file of a rank: its checksum is known when it is written."""

    @functools.wraps(write)
    def hashed(transforms: Sequence[Any], local_proc_idx: int, write_bucket: Any, *args: Any, **kwargs: Any) -> Any:
        path = str(write_bucket[0])
        with ThreadPoolExecutor(1) as beside:
            own = [HashedWrites(one, beside) for one in transforms]
            result = write(own, local_proc_idx, write_bucket, *args, **kwargs)
        for one in own:
            one.note(path)
        return result

    return hashed


def checksum_of_written(path: Path) -> tuple[int, str]:
    """Number of bytes and checksum of a file of this rank: as it was written by this process, else by reading it.

    Raises:
        OSError: it cannot be read.
    """
    return _written.pop(str(path), None) or checksum_of_file(path)


class WithChecksums:
    """Writes a rank's files, and hands their checksums over.

    Args:
        write: what writes them.
        folder: of the checkpoint.
        rank: whose files they are.
    """

    def __init__(self, write: Callable[..., Any], folder: str, rank: int) -> None:
        self._write, self._folder, self._rank = write, folder, rank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write with these arguments."""
        result = self._write(*args, **kwargs)
        folder = Path(self._folder)
        with contextlib.suppress(OSError):  # then the rank computes them itself, and finds out why it cannot
            paths = sorted(folder.glob(SHARDS.format(rank=self._rank)))
            entries = [[path.name, *checksum_of_written(path)] for path in paths]
            (folder / PART.format(rank=self._rank)).write_text(json.dumps(entries), encoding="utf-8")
        return result


def copying_in_background(preload: Callable[..., Any]) -> Callable[..., Any]:
    """Around what brings tensors to the host: in a process of its own, tensors that are there already are copied.

    Such a process shares their memory with the rank, which waits for this call and then goes on to change them.
    """

    @functools.wraps(preload)
    def copied(*args: Any, **kwargs: Any) -> Any:
        buckets = preload(*args, **kwargs)
        if multiprocessing.parent_process() is None or not multiprocessing.current_process().daemon:
            return buckets  # a synchronous save, in the rank itself
        forked_beside_rank()
        return [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in buckets
        ]

    return copied


def results_queue(start: Callable[..., Any], *, cpu: bool) -> Callable[..., Any]:
    """Around what makes the queue that writers put their results in.

    Megatron starts a process for it on every rank, which imports torch (seconds, half a GB) and outlives a rank that is
    killed. Only a writer in another process needs one, and on CPU ranks it is forked.
    """
    own: queue.Queue[Any] = queue.Queue()
    managers: list[SyncManager] = []  # one at most; a manager ends when it is forgotten

    @functools.wraps(start)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if not get_args().async_save:
            return own
        if not cpu:
            return start(*args, **kwargs)
        if not managers:
            managers.append(SyncManager(ctx=multiprocessing.get_context("fork")))
            managers[0].start(forked_beside_rank)
        return managers[0].Queue()

    return chosen
