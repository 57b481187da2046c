"""What a save wrote: every file's size and checksum, and a digest of every parameter's numbers.

The manifest is a JSON file in the iteration's folder. It is written after all other files, in one step (a temporary
file, then a rename), so a folder with a manifest was saved to its end. Megatron and torch open the files that they
know by name and the ones that a checkpoint's index names; they leave this one alone.

The file holds a checksum of its own content: damage to the manifest is told apart from damage to what it lists.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_smartmoe.checkpoint.checksum import ALGORITHM, checksum_of_bytes, checksums
from megatron_smartmoe.checkpoint.digest import KINDS
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import ITEM_BYTES

MANIFEST_FILE = "smartmoe_manifest.json"
VERSION = 1
FORMATS = ("torch_dist", "torch")
Level = Literal["full", "sizes", "off"]
LEVELS: tuple[Level, ...] = ("full", "sizes", "off")
_LARGEST_BYTES = 2**28  # a million experts' digests take 80 MB
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the checkpoint.

    Attributes:
        name: its path in the iteration's folder, with `/`.
        size_bytes: its size.
        checksum: XXH3-128 of its bytes, in hexadecimal.
    """

    name: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class ParameterDigest:
    """Digests of one parameter of one layer, of all its experts if it is theirs.

    Attributes:
        name: `decoder.layers.3.mlp.router.weight`, and for experts without their number,
            `decoder.layers.3.mlp.experts.linear_fc1.weight` (see `checkpoint.names`).
        kind: one of `digest.KINDS`.
        dtype: torch's name of the element type, without "torch.".
        shape: of the logical tensor; for experts, of one of them.
        digests: by logical expert; a single one for what is no expert's.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    digests: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a save wrote.

    Attributes:
        iteration: of the training.
        format: torch_dist or torch.
        files: every file of the folder but the manifest.
        digests: of the model and, if it was saved, of the optimizer.
        consumed_samples: training samples so far; None if unknown.
        arguments: the saving run's arguments, as far as they are JSON.
        placement: where each expert lived, as `Placement.to_json` gives it; None without one.
        software: versions that wrote the checkpoint, by package.
        version: of this file's format.
    """

    iteration: int
    format: str
    files: tuple[FileEntry, ...]
    digests: tuple[ParameterDigest, ...] = ()
    consumed_samples: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, Any] | None = None
    software: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not as it was saved.

    Attributes:
        name: its path in the iteration's folder.
        kind: how it differs.
        what: the end of a sentence about the file.
    """

    name: str
    kind: Literal["missing", "size", "checksum", "unreadable"]
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest of an iteration's folder: all of it or none; returns its path.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    body = json.loads(json.dumps(_as_json(manifest)))  # as it will be read: keys that are numbers become text
    text = _text({**body, "checksum": checksum_of_bytes(_canonical(body))})
    path = folder / MANIFEST_FILE
    temporary = folder / f".{MANIFEST_FILE}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    return path


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an iteration's folder; None if it has none, as of checkpoints of earlier versions and of others.

    Raises:
        CheckpointError: it is damaged, or of a version that is not known here.
    """
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, _LARGEST_BYTES) + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(str(path), "cannot be read", error.strerror or "") from None
    if len(data) > _LARGEST_BYTES:
        raise CheckpointError(str(path), "is too large", f"a manifest has at most {_LARGEST_BYTES:,} bytes")
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), "is damaged", f"it is no JSON: {error}") from None
    try:
        if body["version"] != VERSION:
            rule = f"its format has version {body['version']!r:.40}, and this program reads version {VERSION}"
            raise CheckpointError(str(path), "cannot be used", rule)
        checksum = body.pop("checksum")
        if checksum != checksum_of_bytes(_canonical(body)):
            raise CheckpointError(str(path), "is damaged", "its content does not have the checksum that it holds")
        return _from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(str(path), "is damaged", f"{type(error).__name__}: {error!s:.200}") from None


def check_files(
    folder: Path, manifest: Manifest, level: Level = "full", names: Collection[str] | None = None
) -> tuple[Damage, ...]:
    """The files that are not as the manifest says, in its order.

    Args:
        folder: the iteration's folder.
        manifest: its manifest.
        level: full compares checksums too, and so reads the files; sizes only looks at their sizes; off at nothing.
        names: files to check; None for all. Those that the manifest does not list are not checked.
    """
    if level == "off":
        return ()
    entries = [entry for entry in manifest.files if names is None or entry.name in names]
    damages = {entry.name: damage for entry in entries if (damage := _size_damage(folder, entry)) is not None}
    if level == "full":
        whole = [entry for entry in entries if entry.name not in damages]
        found = checksums([folder / entry.name for entry in whole])
        for entry in whole:
            damage = _content_damage(entry, found[folder / entry.name])
            if damage is not None:
                damages[entry.name] = damage
    return tuple(damages[entry.name] for entry in entries if entry.name in damages)


def file_entries(folder: Path, threads: int | None = None) -> tuple[FileEntry, ...]:
    """Size and checksum of every file in an iteration's folder and below it, but the manifest, by name.

    Raises:
        OSError: a file cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_manifest(path, folder))
    entries = []
    for path, result in checksums(paths, threads).items():
        if isinstance(result, OSError):
            raise result
        size_bytes, checksum = result
        entries.append(FileEntry(name=path.relative_to(folder).as_posix(), size_bytes=size_bytes, checksum=checksum))
    return tuple(entries)


def _is_manifest(path: Path, folder: Path) -> bool:
    return path.parent == folder and path.name.lstrip(".").startswith(MANIFEST_FILE)


def _size_damage(folder: Path, entry: FileEntry) -> Damage | None:
    try:
        size_bytes = (folder / entry.name).stat().st_size
    except FileNotFoundError:
        return Damage(name=entry.name, kind="missing", what="is missing")
    except OSError as error:
        return Damage(name=entry.name, kind="unreadable", what=f"cannot be read: {error.strerror}")
    if size_bytes != entry.size_bytes:
        return Damage(name=entry.name, kind="size", what=f"has {size_bytes:,} of {entry.size_bytes:,} bytes")
    return None


def _content_damage(entry: FileEntry, found: tuple[int, str] | OSError) -> Damage | None:
    if isinstance(found, OSError):
        return Damage(name=entry.name, kind="unreadable", what=f"cannot be read: {found.strerror}")
    if found[1] != entry.checksum:
        return Damage(name=entry.name, kind="checksum", what="has other bytes than were saved (its checksum differs)")
    return None


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _text(body: Mapping[str, Any]) -> str:
    """JSON for a person too: an entry of a list or of a mapping on a line."""
    lines = []
    for key, value in body.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        elif isinstance(value, dict) and value:
            entries = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            text = "{\n  " + ",\n  ".join(entries) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "iteration": manifest.iteration,
        "format": manifest.format,
        "consumed_samples": manifest.consumed_samples,
        "checksums": ALGORITHM,
        "files": [[file.name, file.size_bytes, file.checksum] for file in manifest.files],
        "digests": [
            [entry.name, entry.kind, entry.dtype, list(entry.shape), " ".join(f"{d:016x}" for d in entry.digests)]
            for entry in manifest.digests
        ],
        "arguments": dict(manifest.arguments),
        "placement": None if manifest.placement is None else dict(manifest.placement),
        "software": dict(manifest.software),
    }


def _from_json(body: Mapping[str, Any]) -> Manifest:
    """The manifest in a file's content; anything that is not as `_as_json` writes it raises ValueError or its kin."""
    if body["checksums"] != ALGORITHM:
        raise ValueError(f"checksums of kind {body['checksums']!r:.40}")
    for name, types in (("arguments", dict), ("software", dict), ("placement", dict | None)):
        if not isinstance(body[name], types):
            raise ValueError(f"{name} is a {type(body[name]).__name__}")
    if body["format"] not in FORMATS:
        raise ValueError(f"format {body['format']!r:.40}")
    return Manifest(
        iteration=_count(body["iteration"]),
        format=body["format"],
        files=tuple(_file(*entry) for entry in body["files"]),
        digests=tuple(_digests(*entry) for entry in body["digests"]),
        consumed_samples=None if body["consumed_samples"] is None else _count(body["consumed_samples"]),
        arguments=body["arguments"],
        placement=body["placement"],
        software=body["software"],
    )


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is no number of anything")
    return value


def _file(name: object, size_bytes: object, checksum: object) -> FileEntry:
    if not isinstance(name, str) or not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        raise ValueError(f"{name!r:.100} with checksum {checksum!r:.40}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"it names the file {name!r:.100}, outside its folder")
    return FileEntry(name=name, size_bytes=_count(size_bytes), checksum=checksum)


def _digests(name: object, kind: object, dtype: object, shape: Any, digests: object) -> ParameterDigest:
    if not isinstance(name, str) or kind not in KINDS or dtype not in ITEM_BYTES or not isinstance(digests, str):
        raise ValueError(f"digests of {name!r:.100}, {kind!r:.40}, {dtype!r:.40}")
    words = digests.split(" ")
    if not all(_DIGEST.fullmatch(word) for word in words):
        raise ValueError(f"digests of {name!r:.100}")
    return ParameterDigest(
        name=name,
        kind=str(kind),
        dtype=str(dtype),
        shape=tuple(_count(size) for size in shape),
        digests=tuple(int(word, 16) for word in words),
    )
