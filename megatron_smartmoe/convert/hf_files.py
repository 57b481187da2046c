"""Writing safetensors files as a stream: the header first, then each tensor in slices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe.convert.numbers import size_bytes
from megatron_smartmoe.convert.output import OutputFile, Sink
from megatron_smartmoe.spec.readers.safetensors_files import DTYPES, LENGTH_BYTES

SHARD_BYTES = 5 * 10**9  # as transformers cuts them
SLICE_BYTES = 64 * 2**20
_FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor, as the library pads its header


@dataclass(frozen=True, kw_only=True)
class StoredTensorOut:
    """A tensor to be written.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        dtype: of its numbers.
        slices: gives its numbers, in order, in pieces of about SLICE_BYTES.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: Callable[[], Iterator[NDArray[Any]]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return size_bytes(math.prod(self.shape), self.dtype)


def files_of(tensors: Sequence[StoredTensorOut]) -> tuple[list[OutputFile], dict[str, Any]]:
    """The files that hold these tensors, and the content of the index beside them (empty for one file)."""
    groups: list[list[StoredTensorOut]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.size_bytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size_bytes
    count = len(groups)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    files = [
        OutputFile(name=name, size_bytes=sum(tensor.size_bytes for tensor in group), write=_Writer(group))
        for name, group in zip(names, groups, strict=True)
    ]
    places = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
    total = sum(file.size_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return files, {} if count == 1 else index


class _Writer:
    """Writes one file."""

    def __init__(self, tensors: Sequence[StoredTensorOut]) -> None:
        self._tensors = tensors

    def __call__(self, sink: Sink, progress: Callable[[int], object]) -> Any:
        """Write it."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in self._tensors:
            end = at + tensor.size_bytes
            header[tensor.name] = {
                "dtype": _FORMAT_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        sink.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        sink.write(text)
        for tensor in self._tensors:
            start = sink.tell()
            for numbers in tensor.slices():
                sink.write(numbers)
                progress(numbers.nbytes)
            assert sink.tell() - start == tensor.size_bytes, tensor.name
        return None
