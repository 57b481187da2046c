"""Writing a torch_dist checkpoint without a model: chunks of tensors one after the other, then the index.

A chunk is a box of a tensor, here some rows of one parameter, in the format of `torch.save`. Megatron reads a
checkpoint whatever its chunks are, so their size is what is in memory at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_smartmoe import ops
from megatron_smartmoe.checkpoint.digest import Piece, combine, digest
from megatron_smartmoe.checkpoint.manifest import ParameterDigest
from megatron_smartmoe.checkpoint.torch_dist import COMMON_FILE, COMMON_OBJECT, FORMAT_FILE, INDEX_FILE
from megatron_smartmoe.convert.layout import Place
from megatron_smartmoe.convert.numbers import size_bytes
from megatron_smartmoe.convert.output import OutputFile, Sink, Written

SLICE_BYTES = 64 * 2**20  # of a parameter that are in memory at a time
FILE_BYTES = 2**29  # what a kill costs, at most, for each worker
_OBJECTS_FILE = "__0_objects.distcp"


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """A parameter, or a tensor of its optimizer state, to be written.

    Attributes:
        name: of `checkpoint.names`.
        expert: logical expert; None for what is no expert's.
        kind: one of `checkpoint.digest.KINDS`.
        place: its key and place in the tensor of that key.
        shape: of the parameter itself.
        dtype: of its numbers.
        rows: gives the numbers of its rows from the first argument to before the second.
    """

    name: str
    expert: int | None
    kind: str
    place: Place
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], NDArray[Any]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return size_bytes(math.prod(self.shape), self.dtype)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some rows of a parameter."""

    parameter: StoredParameter
    first: int
    end: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the parameter's own axes."""
        return (self.end - self.first, *self.parameter.shape[1:])

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return size_bytes(math.prod(self.sizes), self.parameter.dtype)


def files_of(parameters: Sequence[StoredParameter], folder: str) -> list[OutputFile]:
    """The files that hold these parameters.

    Args:
        parameters: in the order in which they are to be written.
        folder: of the checkpoint in the output.
    """
    groups: list[list[_Chunk]] = [[]]
    filled = 0
    for chunk in _chunks(parameters):
        if groups[-1] and filled + chunk.size_bytes > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(chunk)
        filled += chunk.size_bytes
    return [
        OutputFile(
            name=f"{folder}/__0_{number}.distcp",
            size_bytes=sum(chunk.size_bytes for chunk in group),
            write=_Writer(group),
        )
        for number, group in enumerate(groups)
    ]


def _chunks(parameters: Iterable[StoredParameter]) -> Iterator[_Chunk]:
    for parameter in parameters:
        num_rows = parameter.shape[0]
        step = max(1, SLICE_BYTES // max(1, parameter.size_bytes // max(1, num_rows)))
        for first in range(0, num_rows, step):
            yield _Chunk(parameter=parameter, first=first, end=min(first + step, num_rows))


class _Writer:
    """Writes one file of chunks; its record is a line for each: key, offsets, sizes, place in the file, digest."""

    def __init__(self, chunks: Sequence[_Chunk]) -> None:
        self._chunks = chunks

    def __call__(self, sink: Sink, progress: Callable[[int], object]) -> Any:
        """Write them."""
        record = []
        sum_of_rows = ops.sum_of_rows if ops.is_compiled() else None
        for chunk in self._chunks:
            parameter, start = chunk.parameter, sink.tell()
            values = parameter.rows(chunk.first, chunk.end)
            stacked = len(parameter.place.index)
            tensor = _as_tensor(values, parameter.dtype).reshape((1,) * stacked + chunk.sizes)
            torch.save(tensor, sink)  # type: ignore[arg-type]  # asks for no more than write
            offsets = (*parameter.place.index, chunk.first, *(0,) * (len(parameter.shape) - 1))
            piece = Piece(
                shape=parameter.shape,
                offsets=(chunk.first, *(0,) * (len(parameter.shape) - 1)),
                sizes=chunk.sizes,
            )
            record.append(
                {
                    "key": parameter.place.key,
                    "offsets": offsets,
                    "sizes": tuple(tensor.shape),
                    "start": start,
                    "length": sink.tell() - start,
                    "digest": f"{digest(values, parameter.dtype, piece, sum_of_rows):016x}",
                }
            )
            progress(chunk.size_bytes)
        return record


def _as_tensor(values: NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).view(getattr(torch, dtype))


def digests_of(parameters: Sequence[StoredParameter], written: Sequence[Written]) -> tuple[ParameterDigest, ...]:
    """The digests of the parameters, of all experts of a layer together, from the records of the files."""
    chunks = iter([line for file in written for line in file.record])
    found: dict[tuple[str, str], dict[int, int]] = {}
    described: dict[tuple[str, str], StoredParameter] = {}
    for parameter in parameters:
        count = len(list(_chunks([parameter])))
        total = combine(int(next(chunks)["digest"], 16) for _ in range(count))
        where = (parameter.name, parameter.kind)
        found.setdefault(where, {})[parameter.expert or 0] = total
        described[where] = parameter
    return tuple(
        ParameterDigest(
            name=name,
            kind=kind,
            dtype=described[name, kind].dtype,
            shape=described[name, kind].shape,
            digests=tuple(of_expert[expert] for expert in sorted(of_expert)),
        )
        for (name, kind), of_expert in found.items()
    )


def write_index(
    folder: Path,
    parameters: Sequence[StoredParameter],
    written: Sequence[Written],
    common: Mapping[str, Any],
    empty_objects: Iterable[str],
    objects: Mapping[str, bytes] | None = None,
) -> None:
    """Write what makes the files a checkpoint: empty objects, the common state in both of its forms, and the index.

    Args:
        folder: of the checkpoint.
        parameters: that were written.
        written: their files.
        common: the common state.
        empty_objects: keys of the empty objects.
        objects: further ones, as files of `torch.save`.
    """
    # Step 1: the chunks of each tensor.
    by_key = {parameter.place.key: parameter for parameter in parameters}
    states: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    boxes: dict[str, list[ChunkStorageMetadata]] = {}
    for file in written:
        name = file.entry.name.rpartition("/")[2]
        for line in file.record:
            offsets, sizes = torch.Size(line["offsets"]), torch.Size(line["sizes"])
            boxes.setdefault(line["key"], []).append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(line["key"], offsets)] = _StorageInfo(name, line["start"], line["length"])
    for key, chunks in boxes.items():
        parameter = by_key[key]
        shape = torch.Size((*parameter.place.sizes, *parameter.shape))
        states[key] = TensorStorageMetadata(TensorProperties(dtype=getattr(torch, parameter.dtype)), shape, chunks)
    # Step 2: the objects. Megatron reads each as a list of one.
    empty = io.BytesIO()
    torch.save([None], empty)
    state = io.BytesIO()
    torch.save([dict(common)], state)
    with (folder / _OBJECTS_FILE).open("wb") as out:
        contents = [(COMMON_OBJECT, state.getvalue()), *((key, empty.getvalue()) for key in empty_objects)]
        for key, content in (*contents, *(objects or {}).items()):
            start = out.tell()
            out.write(content)
            storage[MetadataIndex(key)] = _StorageInfo(_OBJECTS_FILE, start, out.tell() - start)
            states[key] = BytesStorageMetadata()
    # Step 3: the index, and the form of the common state that Megatron 0.17 and 0.18 read.
    torch.save(dict(common), folder / COMMON_FILE)
    metadata = Metadata(state_dict_metadata=states, planner_data=None, storage_data=storage)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    (folder / FORMAT_FILE).write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )


def common_state(arguments: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """The common state of weights without an optimizer."""
    return {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": iteration}
