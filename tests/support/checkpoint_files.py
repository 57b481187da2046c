"""Folders that look like checkpoints, without training: files with a manifest beside them."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_smartmoe.checkpoint.directory import TRACKER, folder_of
from megatron_smartmoe.checkpoint.manifest import Manifest, file_entries, write_manifest


def checkpoint(directory: Path, iteration: int, *, num_files: int = 2, manifest: bool = True) -> Path:
    """The folder of an iteration, whole as far as its manifest says; the tracker names it."""
    folder = folder_of(directory, iteration)
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    for number in range(num_files):
        (folder / f"__{number}_0.distcp").write_bytes(f"{iteration} {number}".encode() * 50)
    if manifest:
        write_manifest(folder, Manifest(iteration=iteration, format="torch_dist", files=file_entries(folder)))
    (directory / TRACKER).write_text(str(iteration))
    return folder
