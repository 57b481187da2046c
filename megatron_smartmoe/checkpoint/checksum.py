"""Checksums of files, for damage by accident: xxHash's XXH3 with 128 bits, as fast as a disk or a page cache delivers.

A file is read in blocks of a fixed size, so memory does not grow with it; several files are read by several threads
(neither reading nor hashing holds Python's lock).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 2**20
_MOST_THREADS = 8  # together with the ranks of a node that read at the same time, enough for a parallel file system


def checksum_of_bytes(data: bytes) -> str:
    """The checksum of bytes, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(data))


def checksum_of_file(path: Path) -> tuple[int, str]:
    """Number of bytes of a file and their checksum.

    Raises:
        OSError: it cannot be read.
    """
    state, size_bytes, block = xxhash.xxh3_128(), 0, bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(view[:count])
            size_bytes += count
    return size_bytes, state.hexdigest()


def checksums(paths: Sequence[Path], threads: int | None = None) -> Mapping[Path, tuple[int, str] | OSError]:
    """Number of bytes and checksum of each file, or the error that reading it gave.

    Args:
        paths: the files.
        threads: how many are read at a time; None for one per core, up to 8.
    """
    return dict(_results(paths, threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))))


def _results(paths: Sequence[Path], threads: int) -> Iterator[tuple[Path, tuple[int, str] | OSError]]:
    with ThreadPoolExecutor(min(threads, max(len(paths), 1))) as pool:
        yield from zip(paths, pool.map(_result, paths), strict=True)


def _result(path: Path) -> tuple[int, str] | OSError:
    try:
        return checksum_of_file(path)
    except OSError as error:
        return error
