"""A look at one checkpoint: whether it is whole.

One with a manifest is whole if all its files are as the manifest says. One without is checked as far as its format
allows: the index of a torch_dist checkpoint knows its files and how long they are at least, and is written last; files
of the older `torch` format have an end of their own, and the arguments say how many there are.

Nothing here reads tensors, unless checksums are asked for: a thousand files take a fraction of a second.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.checkpoint.contents import arguments_in
from megatron_smartmoe.checkpoint.manifest import Level, Manifest, check_files, read_manifest
from megatron_smartmoe.checkpoint.rank_files import RANK_FILE, missing_ranks
from megatron_smartmoe.checkpoint.torch_dist import INDEX_FILE, is_torch_dist, read_common, read_index
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import read_saved


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a look at one checkpoint found.

    Attributes:
        folder: of the checkpoint.
        format: torch_dist or torch; None if it is neither.
        manifest: its manifest, if it has a readable one.
        problems: what is wrong with it, a file each; empty if it is whole, as far as was checked.
        num_files: number of files that were compared.
        size_bytes: what they hold.
        level: full if the files' checksums were compared, sizes if their sizes.
    """

    folder: Path
    format: str | None
    manifest: Manifest | None
    problems: tuple[str, ...]
    num_files: int
    size_bytes: int
    level: Level

    @property
    def is_whole(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not self.problems

    @property
    def problem(self) -> str:
        """The first problem, and how many there are besides."""
        more = len(self.problems) - 1
        return self.problems[0] + (f" ({more} more file{'s' * (more > 1)} damaged)" if more else "")

    def line(self) -> str:
        """What was checked, for a log."""
        files = f"{self.num_files:,} file{'s' * (self.num_files != 1)}, {readable_bytes(self.size_bytes)}"
        if self.manifest is not None:
            what = "sizes and checksums" if self.level == "full" else "sizes"
            return f"checkpoint {self.folder.name} checked: {files}, {what} as in its manifest"
        way = "index and sizes" if self.format == "torch_dist" else "names and ends"
        return (
            f"checkpoint {self.folder.name} has no manifest (it was saved by other software or an earlier version): "
            f"{way} of {files} checked; changed bytes cannot be found"
        )


def inspect(folder: Path, level: Level = "sizes") -> Inspection:
    """Look at one checkpoint: sizes, and checksums with `level` full.

    Never raises for what is in the folder: that is what `problems` is for.
    """
    kind, manifest = _format_of(folder), None
    problems: tuple[str, ...] = ()
    sizes: dict[str, int] = {}
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        problems = (_about(error, folder),)
    if manifest is not None:
        kind = manifest.format
        sizes = {entry.name: entry.size_bytes for entry in manifest.files}
        problems = tuple(str(damage) for damage in check_files(folder, manifest, level))
    elif not problems:
        try:
            sizes, problems = _without_manifest(folder, kind)
        except CheckpointError as error:
            problems = (_about(error, folder),)
    return Inspection(
        folder=folder,
        format=kind,
        manifest=manifest,
        problems=problems,
        num_files=len(sizes),
        size_bytes=sum(sizes.values()),
        level=level if manifest is not None else "sizes",
    )


def readable_bytes(size_bytes: float) -> str:
    """A size with a unit, such as 12.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:,.0f} bytes" if unit == "bytes" else f"{size_bytes:.3g} {unit}"


def _about(error: CheckpointError, folder: Path) -> str:
    """An error about a file of a folder, without the folder."""
    return str(error).removeprefix(f"{folder}/")


def _format_of(folder: Path) -> str | None:
    if is_torch_dist(folder):
        return "torch_dist"
    return "torch" if any(folder.glob(f"mp_rank_*/{RANK_FILE}")) else None


def _without_manifest(folder: Path, kind: str | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes of the files that a checkpoint without a manifest has, and what is wrong with it."""
    if not folder.is_dir():
        return {}, ("the folder is missing",)
    if kind == "torch_dist":
        return _torch_dist_files(folder)
    if kind == "torch":
        return _torch_files(folder)
    rest = sorted(path.name for path in folder.iterdir())
    if not rest:
        return {}, ("the folder is empty",)
    if INDEX_FILE not in rest and any(name.endswith(".distcp") for name in rest):
        return {}, (f"the save was not finished: it has no {INDEX_FILE}",)
    return {}, ("it is neither a torch_dist nor a torch checkpoint: metadata.json is missing or damaged",)


def _torch_dist_files(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    index = read_index(folder)
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for name, least in index.smallest_sizes().items():
        try:
            sizes[name] = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}")
            continue
        if sizes[name] < least:
            problems.append(f"{name} has {sizes[name]:,} of at least {least:,} bytes")
    if not problems:
        read_common(folder, index)
    return sizes, tuple(problems)


def _torch_files(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    sizes: dict[str, int] = {}
    problems: list[str] = []
    files = sorted(folder.glob("mp_rank_*/*.pt"))
    for path in files:
        name = path.relative_to(folder).as_posix()
        sizes[name] = path.stat().st_size
        if not _has_end(path):
            problems.append(f"{name} is damaged: it has no end")
    if not problems:
        problems += _missing_ranks(folder)
    return sizes, tuple(problems)


def _has_end(path: Path) -> bool:
    """Whether a file of torch.save is there to its end, where a zip archive has its index."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _missing_ranks(folder: Path) -> Iterator[str]:
    """Files of model-parallel ranks that the arguments in the first one ask for and that are not there."""
    first = min(folder.glob(f"mp_rank_*/{RANK_FILE}"))
    content = read_saved(first, str(first))
    arguments = arguments_in(content) if isinstance(content, dict) else {}
    return (f"{name} is missing" for name in missing_ranks(folder, arguments))
