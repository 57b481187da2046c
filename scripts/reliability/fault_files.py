"""Faults on the files of a checkpoint: bits that flipped, an end that is missing, a file that is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_smartmoe.checkpoint.directory import TRACKER, folder_of
from megatron_smartmoe.checkpoint.manifest import MANIFEST_FILE

BITS = 0x41  # that a flip changes in every byte
FLIPPED_BYTES = 64


def prepare(reference: Path, run_dir: Path, iteration: int) -> None:
    """Copy a finished run as it was right after it saved `iteration`: later checkpoints and metrics are taken away."""
    shutil.copytree(reference, run_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs", "complete"))
    checkpoints = run_dir / "checkpoints"
    for folder in checkpoints.glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(folder)
    (checkpoints / TRACKER).write_text(str(iteration), encoding="ascii")
    metrics = run_dir / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(True) if json.loads(line)["iteration"] <= iteration]
    metrics.write_text("".join(kept))


def damage(checkpoints: Path, kind: str, which: str, at: float) -> Path:
    """Damage one file of the newest checkpoint; returns it.

    Args:
        checkpoints: the folder of `--save`.
        kind: a kind of `fault_plan.ON_FILES`.
        which: a name of `fault_plan.FILES`.
        at: where in the file, as a share of its length.
    """
    newest = folder_of(checkpoints, int((checkpoints / TRACKER).read_text()))
    shards = sorted(newest.glob("*.distcp"), key=lambda shard: -shard.stat().st_size)
    file = {
        "largest shard": shards[0],
        "another shard": shards[-1],
        "index": newest / ".metadata",
        "format": newest / "metadata.json",
        "tracker": checkpoints / TRACKER,
        "manifest": newest / MANIFEST_FILE,
    }[which]
    content = bytearray(file.read_bytes())
    if kind == "missing file":
        file.unlink()
        return file
    place = int(len(content) * at)
    if kind == "truncated file":
        file.write_bytes(content[:place])
        return file
    for index in range(place, min(place + FLIPPED_BYTES, len(content))):
        content[index] ^= BITS
    file.write_bytes(content)
    return file
