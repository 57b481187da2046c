"""Files of `torch.save`, read as data: the object, and its tensors as descriptions whose numbers are read on demand.

Such a file is a zip archive that stores (never packs) a pickle of the object and, beside it, the bytes of each storage.
A tensor is a view of a storage. Here a tensor comes as a `StoredTensor`: where its bytes are. Reading it asks for no
more memory than a block, whatever sizes the file claims: a view has to lie in its storage, a storage in the file.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.unpickle import Opaque, read_pickle

# Bytes of one element, by torch's name of the type without "torch.".
ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
BLOCK_ELEMENTS = 2**20  # that are in memory at a time
_LARGEST_PICKLE_BYTES = 2**30  # arguments, random states and names of tensors take kilobytes or a few megabytes
_LOCAL_HEADER_BYTES = 30
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# What zipfile and the code below raise for an archive that is none.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
)
_NUMPY = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2"}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, and where its bytes are.

    Attributes:
        path: the file.
        dtype: torch's name of the element type, without "torch.".
        shape: of the tensor.
        strides: elements between neighbours along each axis.
        offset_bytes: of its first element in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return self.num_elements * ITEM_BYTES[self.dtype]

    def at(self, index: Sequence[int]) -> StoredTensor:
        """The part at an index of the first axes, which it does not have any more."""
        skipped = sum(i * stride for i, stride in zip(index, self.strides, strict=False))
        return replace(
            self,
            shape=self.shape[len(index) :],
            strides=self.strides[len(index) :],
            offset_bytes=self.offset_bytes + skipped * ITEM_BYTES[self.dtype],
        )

    def rows(self, first: int, count: int) -> StoredTensor:
        """Some entries of the first axis."""
        assert first + count <= self.shape[0], (first, count, self.shape)
        skipped_bytes = first * self.strides[0] * ITEM_BYTES[self.dtype]
        return replace(self, shape=(count, *self.shape[1:]), offset_bytes=self.offset_bytes + skipped_bytes)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements in row-major order, from `start` to `stop`; bfloat16 and 8-bit floats as unsigned integers.

        A tensor whose elements do not follow each other, such as a transposed one, is read as a whole first.

        Raises:
            CheckpointError: the file has become shorter.
        """
        stop = self.num_elements if stop is None else stop
        if _is_contiguous(self.shape, self.strides):
            return self._read_storage(start, stop - start)
        numbers = self._read_storage(0, _span(self.shape, self.strides))
        strides = [stride * numbers.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers, self.shape, strides, writeable=False)
        return view.reshape(-1)[start:stop]

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """All elements in row-major order, a block at a time: index of the block's first element, and the block."""
        size = BLOCK_ELEMENTS if _is_contiguous(self.shape, self.strides) else max(self.num_elements, 1)
        for start in range(0, self.num_elements, size):
            yield start, self.read(start, min(start + size, self.num_elements))

    def _read_storage(self, first: int, count: int) -> NDArray[Any]:
        """`count` elements of the storage, `first` elements behind the tensor's first one."""
        kind = _NUMPY.get(self.dtype, f"<u{ITEM_BYTES[self.dtype]}")
        size = ITEM_BYTES[self.dtype]
        try:
            with self.path.open("rb", buffering=0) as file:
                numbers = np.fromfile(file, kind, count, offset=self.offset_bytes + first * size)
        except OSError as error:
            raise CheckpointError(str(self.path), "cannot be read", error.strerror or "") from None
        if len(numbers) < count:
            raise CheckpointError(str(self.path), "is truncated", f"it ends in a tensor of shape {self.shape}")
        return numbers


def read_saved(path: Path, where: str, offset_bytes: int = 0, length_bytes: int | None = None) -> Any:
    """The object that `torch.save` wrote to a file, or to a part of one; its tensors as `StoredTensor`.

    Args:
        path: the file.
        where: names the source in an error.
        offset_bytes: first byte of the part.
        length_bytes: of the part; None for all that is behind `offset_bytes`.

    Raises:
        CheckpointError: it cannot be read, or is damaged, or unpacks to more than an object of a checkpoint ever takes.
    """
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, io.SEEK_END)
            stop = size_bytes if length_bytes is None else offset_bytes + length_bytes
            if stop > size_bytes:
                rule = f"it has {size_bytes:,} bytes, and {where.removeprefix(f'{path}, ')} ends at byte {stop:,}"
                raise CheckpointError(str(path), "is truncated", rule)
            part = _Part(file, offset_bytes, stop)
            with zipfile.ZipFile(part) as archive:
                return _read_archive(archive, part, path, where)
    except OSError as error:
        raise CheckpointError(str(path), "cannot be read", error.strerror or str(error)) from None
    except _DAMAGE as error:
        raise CheckpointError(where, "is damaged", f"{type(error).__name__}: {error!s:.200}") from None


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.BufferedReader, start: int, stop: int) -> None:
        self._file, self._at = file, 0
        self.start, self.size_bytes = start, stop - start

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence]
        if self._at < 0:
            raise OSError(22, "Invalid argument")
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = max(self.size_bytes - self._at, 0)
        count = left if count is None or count < 0 else min(count, left)
        self._file.seek(self.start + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data


@dataclass(frozen=True, kw_only=True)
class _Storage:
    """Bytes of a storage in a file; `dtype` is None where the tensor says it."""

    dtype: str | None
    offset_bytes: int
    size_bytes: int


def _read_archive(archive: zipfile.ZipFile, part: _Part, path: Path, where: str) -> Any:
    entries = {info.filename.rpartition("/")[2]: info for info in archive.infolist() if "/data/" not in info.filename}
    data = {info.filename.rpartition("/")[2]: info for info in archive.infolist() if "/data/" in info.filename}
    pickled = entries["data.pkl"]
    if pickled.file_size > _LARGEST_PICKLE_BYTES:
        raise CheckpointError(where, "is too large", f"it unpacks to {pickled.file_size:,} bytes")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(where, "cannot be read", "it was written by a big-endian machine")

    def storage(pid: Any) -> _Storage:
        kind, storage_type, key, _, _ = pid
        if kind != "storage":
            raise ValueError(f"persistent id {pid!r:.100}")
        name = getattr(storage_type, "qualified_name", "").rpartition(".")[2]
        info = data[key]
        return _Storage(dtype=_STORAGES.get(name), offset_bytes=_data_offset(info, part), size_bytes=info.file_size)

    def tensor(held: _Storage, first: int, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
        dtype = held.dtype
        if dtype is None:  # a storage without a type, as of _rebuild_tensor_v3: its fourth further argument is the type
            dtype = getattr(rest[2], "qualified_name", "").rpartition(".")[2] if len(rest) > 2 else None
        return _view(held, dtype, first, tuple(shape), tuple(strides), path)

    def with_attributes(build: Any, _: Any, args: Any, *rest: Any) -> StoredTensor:
        if build is not tensor:
            raise ValueError(f"a tensor that {build!r:.100} makes")
        found: StoredTensor = tensor(*args)
        return found

    known = {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor,
        "torch._utils._rebuild_parameter": lambda inner, *_: inner,
        "torch._utils._rebuild_parameter_with_state": lambda inner, *_: inner,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
    }
    return read_pickle(archive.read(pickled), known, where, storage)


def _data_offset(info: zipfile.ZipInfo, part: _Part) -> int:
    """Where in the whole file the bytes of an entry are."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"storage {info.filename!r:.100} is packed, which torch never does")
    part.seek(info.header_offset)
    header = part.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise ValueError(f"storage {info.filename!r:.100} has no header")
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if offset + info.file_size > part.size_bytes:
        raise ValueError(f"storage {info.filename!r:.100} ends behind the file")
    return part.start + offset


def _view(
    held: _Storage, dtype: str | None, first: int, shape: tuple[int, ...], strides: tuple[int, ...], path: Path
) -> StoredTensor:
    if dtype not in ITEM_BYTES:
        raise ValueError(f"a tensor of type {dtype!r:.40}")
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in (first, *shape, *strides)):
        raise ValueError(f"a tensor of shape {shape!r:.100}, strides {strides!r:.100}")
    size = ITEM_BYTES[dtype]
    if (first + _span(shape, strides)) * size > held.size_bytes:
        raise ValueError(f"a tensor of shape {shape!r:.100} is larger than its storage of {held.size_bytes:,} bytes")
    if math.prod(shape) > _span(shape, strides):  # strides of 0 make much out of little
        raise ValueError(f"a tensor of shape {shape!r:.100} whose elements share their bytes")
    return StoredTensor(
        path=path, dtype=dtype, shape=shape, strides=strides, offset_bytes=held.offset_bytes + first * size
    )


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a view."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def class_of(entry: object) -> str:
    """The name of an object's class, also of one that is not known here."""
    return entry.qualified_name.rpartition(".")[2] if isinstance(entry, Opaque) else type(entry).__name__
