"""The checkpoints in a directory, newest first, and which of them are whole, as far as their sizes show it."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_smartmoe.checkpoint.manifest import check_files, read_manifest
from megatron_smartmoe.checkpoint.torch_dist import is_torch_dist, read_common
from megatron_smartmoe.errors import CheckpointError

_PREFIX = "iter_"


def save_directory(args: Namespace, *, non_persistent: bool) -> Path | None:
    """Where Megatron saves to; None where that is not a folder that all ranks share."""
    directory = args.save
    if non_persistent:
        if args.non_persistent_ckpt_type != "global":
            return None
        directory = args.non_persistent_global_ckpt_dir or os.path.join(args.save, "non_persistent")
    return None if "://" in str(directory) else Path(directory)


def folder_of(directory: Path, iteration: int) -> Path:
    """The folder of an iteration."""
    return directory / f"{_PREFIX}{iteration:07d}"


def iteration_folders(directory: Path) -> list[Path]:
    """The folders of iterations, newest first."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir() and _is_number(path)]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(folder: Path) -> int:
    """The iteration that a folder is named after."""
    return int(folder.name.removeprefix(_PREFIX))


def _is_number(path: Path) -> bool:
    number = path.name.removeprefix(_PREFIX)
    return number.isascii() and number.isdecimal()


def is_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint are there with their sizes; without a manifest, whether it was finished."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            return not check_files(folder, manifest, "sizes")
        if is_torch_dist(folder):
            read_common(folder)
            return True
    except CheckpointError:
        return False
    return any(folder.glob("mp_rank_*/model_optim_rng.pt"))
