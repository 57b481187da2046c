"""Writing a file of `torch.save` as a stream: its tensors a slice at a time.

`torch.save` wants all of an object in memory. The format is a zip archive that stores, unpacked, a pickle of the object
and one entry for the bytes of each tensor; `spec.readers.torch_save` reads it.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._utils
from numpy.typing import NDArray

from megatron_smartmoe.convert.numbers import size_bytes
from megatron_smartmoe.convert.output import Sink

_FOLDER = "model_optim_rng"  # of the archive's entries; torch takes any name
_ALIGNMENT_BYTES = 64  # of a tensor's bytes in the file, as torch has it
_HEADER_BYTES, _ZIP64_BYTES, _EXTRA_BYTES = 30, 20, 4
_PADDING_ID = 0x4246  # "FB": of the field that torch pads its headers with
_STORAGES = {
    "float32": torch.FloatStorage,
    "bfloat16": torch.BFloat16Storage,
    "float16": torch.HalfStorage,
    "float64": torch.DoubleStorage,
    "int64": torch.LongStorage,
    "int32": torch.IntStorage,
}


@dataclass(frozen=True, kw_only=True)
class StreamedTensor:
    """A tensor of an object to be written, in place of the tensor itself.

    Attributes:
        number: of its entry in the archive, from 0 on.
        dtype: of its numbers.
        shape: of the tensor.
        slices: gives its numbers in order, flat.
    """

    number: int
    dtype: str
    shape: tuple[int, ...]
    slices: Callable[[], Iterable[NDArray[Any]]]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class _Storage:
    """What the pickle says of a tensor's bytes."""

    def __init__(self, tensor: StreamedTensor) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Pickles streamed tensors as torch pickles tensors."""

    def persistent_id(self, obj: Any) -> Any:
        """The description of a tensor's bytes; None for any other object."""
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        return "storage", _STORAGES[tensor.dtype], str(tensor.number), "cpu", tensor.num_elements

    def reducer_override(self, obj: Any) -> Any:
        """How to build a tensor again."""
        if not isinstance(obj, StreamedTensor):
            return NotImplemented
        strides, stride = [], 1
        for size in reversed(obj.shape):
            strides.append(stride)
            stride *= size
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        build = torch._utils._rebuild_tensor_v2
        return build, (_Storage(obj), 0, obj.shape, tuple(reversed(strides)), False, hooks)


def write_saved(sink: Sink, content: Mapping[str, Any], tensors: Sequence[StreamedTensor]) -> None:
    """Write an object as `torch.save` does.

    Args:
        sink: the file.
        content: the object, with streamed tensors in it.
        tensors: these tensors, by number.
    """
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]  # write and tell do
        archive.writestr(f"{_FOLDER}/data.pkl", pickled.getvalue())
        archive.writestr(f"{_FOLDER}/byteorder", "little")
        for tensor in tensors:
            is_large = size_bytes(tensor.num_elements, tensor.dtype) >= zipfile.ZIP64_LIMIT
            entry = zipfile.ZipInfo(f"{_FOLDER}/data/{tensor.number}")
            entry.extra = _padding(sink.tell() + _HEADER_BYTES + len(entry.filename) + _ZIP64_BYTES * is_large)
            with archive.open(entry, "w", force_zip64=is_large) as out:
                for numbers in tensor.slices():
                    out.write(memoryview(numbers).cast("B"))
        archive.writestr(f"{_FOLDER}/version", "3\n")


def _padding(at: int) -> bytes:
    """A header field that ends at a multiple of the alignment, behind `at`."""
    count = -(at + _EXTRA_BYTES) % _ALIGNMENT_BYTES
    return _PADDING_ID.to_bytes(2, "little") + count.to_bytes(2, "little") + b"Z" * count
