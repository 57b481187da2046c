#!/usr/bin/env python3
"""What it costs to check a checkpoint: CPU seconds per GB of checksums and digests, seconds for many files.

    python scripts/bench_checkpoint.py [--gb 1] [--files 1000] [--folder /tmp]

Checksums are of a file that was just written, so from the page cache: a disk may be slower than the hash. Digests are
computed on one core, by the compiled op as CPU ranks do it and by numpy as `smartmoe checkpoint verify` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.checkpoint.checksum import checksum_of_file
from megatron_smartmoe.checkpoint.digest import ITEM_BYTES, Piece, digest
from megatron_smartmoe.checkpoint.directory import folder_of
from megatron_smartmoe.checkpoint.inspection import inspect
from megatron_smartmoe.checkpoint.manifest import Manifest, file_entries, write_manifest
from megatron_smartmoe.runtime.tensor_digest import digest_of_tensor

_BLOCK_BYTES = 2**25


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file and of the tensors (default: 1)")
    parser.add_argument("--files", type=int, default=1000, help="files of the checkpoint (default: 1000)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _checksums(Path(folder), options.gb)
        _many_files(Path(folder), options.files)
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
