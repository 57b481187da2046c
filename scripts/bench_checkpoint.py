#!/usr/bin/env python3
"""What it costs to check a checkpoint: CPU seconds per GB of checksums and digests, seconds for many files.

    python scripts/bench_checkpoint.py [--gb 1] [--files 1000] [--chunks 100000] [--folder /tmp]

Checksums are of a file that was just written, so from the page cache: a disk may be slower than the hash. Digests are
computed on one core, by the compiled op as CPU ranks do it and by numpy as `smartmoe checkpoint verify` does.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_smartmoe import ops
from megatron_smartmoe.checkpoint.checksum import checksum_of_file
from megatron_smartmoe.checkpoint.digest import ITEM_BYTES, Piece, digest
from megatron_smartmoe.checkpoint.directory import folder_of
from megatron_smartmoe.checkpoint.inspection import inspect
from megatron_smartmoe.checkpoint.manifest import Manifest, file_entries, write_manifest
from megatron_smartmoe.checkpoint.torch_dist import COMMON_FILE, FORMAT_FILE, INDEX_FILE
from megatron_smartmoe.runtime.tensor_digest import digest_of_tensor

_BLOCK_BYTES = 2**25


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file and of the tensors (default: 1)")
    parser.add_argument("--files", type=int, default=1000, help="files of the checkpoint (default: 1000)")
    parser.add_argument("--chunks", type=int, default=100_000, help="chunks of tensors in them (default: 100000)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _checksums(Path(folder), options.gb)
        _many_files(Path(folder), options.files)
        _many_chunks(Path(folder), options.files, options.chunks)
    for dtype in ("float32", "bfloat16"):
        _digests(dtype, options.gb)


def _checksums(folder: Path, size_gb: float) -> None:
    path, block = folder / "data", np.random.default_rng(1).bytes(_BLOCK_BYTES)
    with path.open("wb") as file:
        for _ in range(round(size_gb * 1e9 / _BLOCK_BYTES)):
            file.write(block)
    size_bytes = path.stat().st_size
    cpu_s, wall_s = _timed(lambda: checksum_of_file(path))
    path.unlink()
    per_gb = 1e9 / size_bytes
    print(f"checksum of a file: {cpu_s * per_gb:.3f} CPU s per GB ({wall_s * per_gb:.3f} s)")


def _many_files(folder: Path, num_files: int) -> None:
    checkpoint = folder_of(folder, 1)
    checkpoint.mkdir()
    for number in range(num_files):
        (checkpoint / f"__{number}_0.distcp").write_bytes(b"x" * 1000)
    manifest = Manifest(iteration=1, format="torch_dist", files=file_entries(checkpoint))
    write_manifest(checkpoint, manifest)
    _, wall_s = _timed(lambda: inspect(checkpoint))
    print(f"check before the ranks start, {num_files:,} files: {wall_s:.3f} s")


def _many_chunks(folder: Path, num_files: int, num_chunks: int) -> None:
    """A checkpoint without a manifest: its index is read. Each tensor has 100 chunks of 8 rows."""
    checkpoint, sizes = folder_of(folder, 2), torch.Size((8, 64))
    checkpoint.mkdir()
    states: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for number in range(num_chunks // 100):
        key = f"decoder.layers.{number}.mlp.experts.experts.linear_fc1.weight"
        chunks = [ChunkStorageMetadata(torch.Size((8 * chunk, 0)), sizes) for chunk in range(100)]
        states[key] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((800, 64)), chunks)
        for chunk in chunks:
            at, file = divmod(len(storage), num_files)
            storage[MetadataIndex(key, chunk.offsets)] = _StorageInfo(f"__{file}_0.distcp", 1000 * at, 1000)
    for number in range(num_files):
        with (checkpoint / f"__{number}_0.distcp").open("wb") as out:
            out.truncate(1000 * (num_chunks // num_files + 1))
    torch.save({"iteration": 2}, checkpoint / COMMON_FILE)
    metadata = Metadata(state_dict_metadata=states, planner_data=None, storage_data=storage)
    (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    (checkpoint / FORMAT_FILE).write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert not inspect(checkpoint).problems
    cpu_s, wall_s = _timed(lambda: inspect(checkpoint))
    print(f"check without a manifest, {len(storage):,} chunks, {num_files:,} files: {cpu_s:.2f} CPU s ({wall_s:.2f} s)")


def _digests(dtype: str, size_gb: float) -> None:
    rows, columns = round(size_gb * 1e9 / ITEM_BYTES[dtype] / 4096), 4096
    kind = np.float32 if dtype == "float32" else np.uint16
    elements = np.ones((rows, columns), kind)
    piece, tensor = Piece.whole(elements.shape), torch.from_numpy(elements)
    tensor = tensor if dtype == "float32" else tensor.view(torch.bfloat16)
    per_gb = 1e9 / elements.nbytes
    for what, work in (
        (ops.backend(), lambda: digest_of_tensor(tensor, piece)),
        ("numpy", lambda: digest(elements, dtype, piece)),
    ):
        cpu_s, wall_s = _timed(work)
        print(f"digest of {dtype}, {what}: {cpu_s * per_gb:.2f} CPU s per GB ({wall_s * per_gb:.2f} s)")


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of the fastest of three."""
    times = []
    for _ in range(3):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        work()
        times.append((time.process_time() - cpu_s, time.perf_counter() - wall_s))
    return min(times)


if __name__ == "__main__":
    main()
