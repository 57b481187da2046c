"""What a manifest says of a save's folder: the files that each rank is responsible for, and the rest."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_smartmoe import __version__
from megatron_smartmoe.adapter.launch.secrets import secrets_among
from megatron_smartmoe.checkpoint.checksum import checksum_of_file
from megatron_smartmoe.checkpoint.manifest import MANIFEST_FILE, FileEntry, Manifest, ParameterDigest
from megatron_smartmoe.spec.secrets import MASK

_SHARDS = "__{rank}_*.distcp"  # files of one rank in torch_dist
_SOFTWARE = ("megatron-core", "torch", "numpy")  # whose versions a manifest names


def own_entries(folder: Path, ckpt_format: str, rank: int, world_size: int) -> list[FileEntry]:
    """Size and checksum of the files that a rank is responsible for: in torch_dist its own, else an equal part.

    They have just been written, so they are read from the page cache.

    Raises:
        OSError: one cannot be read.
    """
    if ckpt_format == "torch_dist":
        paths = sorted(folder.glob(_SHARDS.format(rank=rank)))
    else:
        paths = _files(folder)[rank::world_size]
    return [_entry(folder, path) for path in paths]


def manifest_of(
    folder: Path, iteration: int, args: Namespace, entries: Sequence[FileEntry], digests: tuple[ParameterDigest, ...]
) -> Manifest:
    """The manifest of a save, with the checksums of the files that no rank has listed.

    Args:
        folder: of the iteration.
        iteration: that is saved.
        args: Megatron's arguments at the save.
        entries: of the files that the ranks are responsible for.
        digests: of the model and the optimizer.

    Raises:
        OSError: a file cannot be read.
    """
    listed = {entry.name for entry in entries}
    others = [_entry(folder, path) for path in _files(folder) if path.relative_to(folder).as_posix() not in listed]
    return Manifest(
        iteration=iteration,
        format=args.ckpt_format,
        files=tuple(sorted([*entries, *others], key=lambda entry: entry.name)),
        digests=digests,
        consumed_samples=int(args.consumed_train_samples),
        arguments={name: _masked(name, value) for name, value in sorted(vars(args).items()) if _is_plain(value)},
        placement=getattr(args, "smartmoe_placement", None),
        software={"megatron_smartmoe": __version__} | {name: metadata.version(name) for name in _SOFTWARE},
    )


def _files(folder: Path) -> list[Path]:
    """Every file of an iteration but the manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and MANIFEST_FILE not in path.name)


def _entry(folder: Path, path: Path) -> FileEntry:
    size_bytes, checksum = checksum_of_file(path)
    return FileEntry(name=path.relative_to(folder).as_posix(), size_bytes=size_bytes, checksum=checksum)


def _masked(name: str, value: object) -> object:
    """A value as the manifest has it: as it is, unless it is a secret."""
    is_secret = isinstance(value, str) and secrets_among((f"--{name.replace('_', '-')}", value))
    return MASK if is_secret else value


def _is_plain(value: object) -> bool:
    """Whether a value of an argument can be written as JSON."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)
