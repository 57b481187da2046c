"""The index and the objects of a torch_dist checkpoint, read as data.

A torch_dist checkpoint is a folder: `metadata.json` names the format, `.metadata` is a pickled index of every tensor
and object, and the `.distcp` files hold their bytes, each a file of `torch.save`. Since Megatron 0.19 what is not
sharded (arguments, iteration, scheduler) is one of the objects, `common_state`; before, it was a file `common.pt`. Both
are zip files with a pickle in them.

torch's own reader unpickles index and objects, and so runs whatever they say. This one reads them with
`spec.readers.unpickle`, in milliseconds, before torch or Megatron is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_smartmoe.errors import CheckpointError, ConfigError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_json
from megatron_smartmoe.spec.readers.torch_save import StoredTensor, class_of, read_saved
from megatron_smartmoe.spec.readers.unpickle import read_pickle

COMMON_OBJECT = "common_state/shard_0_1"  # key of Megatron's ShardedObject("common_state", None, (1,), (0,))
COMMON_FILE = "common.pt"
INDEX_FILE = ".metadata"
FORMAT_FILE = "metadata.json"


class StoredItem(NamedTuple):
    """Where the bytes of one object, or of one chunk of a tensor, are.

    Attributes:
        file: name of the file, in the checkpoint's folder.
        offset_bytes: first byte in the file.
        length_bytes: number of bytes.
    """

    file: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """What a torch_dist checkpoint holds.

    Attributes:
        folder: of the checkpoint.
        shapes: the global shape of each tensor, by key.
        items: where each object, and each chunk of a tensor, is, by key and offsets of the chunk (empty for objects).
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    items: Mapping[tuple[str, tuple[int, ...]], StoredItem]

    def read_object(self, key: str) -> Any:
        """The object with this key.

        Raises:
            CheckpointError: the checkpoint has no such object, or its bytes are missing or damaged.
        """
        item = self.items.get((key, ()))
        if item is None:
            raise CheckpointError(str(self.folder), "is incomplete", f"it has no object {key!r}")
        path = self.folder / item.file
        return read_saved(path, f"{path}, object {key!r}", item.offset_bytes, item.length_bytes)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], StoredTensor]]:
        """Key, offsets and numbers of each chunk of each tensor, in the order of the files: one is open at a time.

        Raises:
            CheckpointError: a chunk is missing, damaged or no tensor, or lies outside its tensor.
        """
        items = [(item, *where) for where, item in self.items.items() if where[0] in self.shapes]
        for item, key, offsets in sorted(items, key=lambda entry: (entry[0].file, entry[0].offset_bytes)):
            path = self.folder / item.file
            tensor = read_saved(path, f"{path}, tensor {key!r}", item.offset_bytes, item.length_bytes)
            shape = self.shapes[key]
            if not isinstance(tensor, StoredTensor) or not _is_inside(offsets, tensor.shape, shape):
                rule = f"{key!r} at {offsets} is {tensor!r:.200}, and the whole is {shape}"
                raise CheckpointError(str(path), "is damaged", rule)
            yield key, offsets, tensor

    def smallest_sizes(self) -> Mapping[str, int]:
        """The bytes that each file must have at least, to hold what the index says."""
        sizes: dict[str, int] = {}
        for file, offset_bytes, length_bytes in self.items.values():
            if offset_bytes + length_bytes > sizes.get(file, -1):
                sizes[file] = offset_bytes + length_bytes
        return sizes


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder says that it is a torch_dist checkpoint; what it holds may still be damaged."""
    try:
        content = read_json(Named(path=folder / FORMAT_FILE, field="--load", way_out="Pass another checkpoint."))
    except ConfigError:
        return False
    return isinstance(content, dict) and content.get("sharded_backend") == "torch_dist"


def read_index(folder: Path) -> CheckpointIndex:
    """The index of a torch_dist checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / INDEX_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), "cannot be read", error.strerror or "") from None
    with _without_collector():
        return _index_of(data, path)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's cycle collector does not run: it takes half of the time of reading a large index, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _index_of(data: bytes, path: Path) -> CheckpointIndex:
    content = _fields(read_pickle(data, {}, str(path)), "Metadata", path)
    try:
        shapes = {
            str(key): tuple(int(size) for size in entry.state["size"])
            for key, entry in content["state_dict_metadata"].items()
            if class_of(entry) == "TensorStorageMetadata"
        }
        items = dict(_items(content["storage_data"], path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(str(path), "is damaged", f"{type(error).__name__}: {error}") from None
    return CheckpointIndex(folder=path.parent, shapes=shapes, items=items)


def read_common(folder: Path, index: CheckpointIndex | None = None) -> Mapping[str, Any]:
    """What a checkpoint holds besides its tensors: `args`, `iteration`, and the schedules.

    Args:
        folder: of the checkpoint.
        index: its index, if it was read already.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / COMMON_FILE
    if path.is_file():
        content = read_saved(path, str(path))
    else:
        path = folder / INDEX_FILE
        content = (index or read_index(folder)).read_object(COMMON_OBJECT)
    if isinstance(content, list) and len(content) == 1:  # Megatron wraps an object in a list
        content = content[0]
    if not isinstance(content, Mapping):
        raise CheckpointError(str(path), "is damaged", f"its common state is a {type(content).__name__}, no mapping")
    return content


def _is_inside(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        offset >= 0 and offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
    )


def _fields(entry: object, name: str, path: Path) -> Mapping[str, Any]:
    """The fields of a pickled dataclass of torch.distributed.checkpoint."""
    state = getattr(entry, "state", None)
    if type(state) is not dict or class_of(entry) != name:
        raise CheckpointError(str(path), "is damaged", f"it holds {entry!r:.100}, where {name} was expected")
    return state


def _items(storage: Mapping[Any, Any], path: Path) -> Iterator[tuple[tuple[str, tuple[int, ...]], StoredItem]]:
    """Where everything is; a large checkpoint has a hundred thousand of these."""
    checked: set[str] = set()
    kinds: set[tuple[type, type]] = set()
    for index, info in storage.items():
        if (type(index), type(info)) not in kinds:
            _fields(info, "_StorageInfo", path), _fields(index, "MetadataIndex", path)
            kinds.add((type(index), type(info)))
        where, what = info.state, index.state
        file = str(where["relative_path"])
        if file not in checked:
            if "/" in file or file.startswith("."):
                raise CheckpointError(str(path), "is damaged", f"it names the file {file[:100]!r}, outside its folder")
            checked.add(file)
        first, length = int(where["offset"]), int(where["length"])
        if first < 0 or length < 0:
            raise CheckpointError(str(path), "is damaged", f"it has an item of {file!r} at a negative place")
        offsets = tuple(map(int, what.get("offset") or ()))
        yield (str(what["fqn"]), offsets), StoredItem(file, first, length)
