"""Safetensors files: where each tensor's bytes are, as `StoredTensor`, whose numbers are read on demand.

A file is 8 bytes with the length of a JSON header, the header, and the bytes of the tensors. The safetensors library
maps the file into memory, and gives numpy neither bfloat16 nor 8-bit floats; here any rows of a tensor are read with
one `read`, by as many threads as there are, and nothing of a file stays in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import ITEM_BYTES, StoredTensor

LENGTH_BYTES = 8  # of the header's length, little endian
_LARGEST_HEADER_BYTES = 100_000_000  # the library's own limit
# Torch's names of element types, by the format's.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_METADATA = "__metadata__"


def read_header(path: Path) -> Mapping[str, StoredTensor]:
    """Where the tensors of a file are, by name.

    Raises:
        CheckpointError: it cannot be read, is no safetensors file, or is truncated.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(LENGTH_BYTES)
            length = int.from_bytes(head, "little")
            if len(head) < LENGTH_BYTES or length > _LARGEST_HEADER_BYTES:
                raise _no_safetensors(path, head)
            if length > size_bytes - LENGTH_BYTES:
                rule = f"its header has {length:,} bytes, and the file {size_bytes:,}"
                raise CheckpointError(str(path), "is truncated", rule)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(str(path), "cannot be read", error.strerror or str(error)) from None
    try:
        content = json.loads(text)
        entries = {name: entry for name, entry in content.items() if name != _METADATA}
        tensors = {name: _tensor(path, name, entry, LENGTH_BYTES + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(str(path), "is damaged", f"its header: {error!s:.200}") from None
    end = max((tensor.offset_bytes + tensor.size_bytes for tensor in tensors.values()), default=LENGTH_BYTES + length)
    if size_bytes != end:
        what = "is truncated" if size_bytes < end else "is damaged"
        raise CheckpointError(str(path), what, f"it has {size_bytes:,} bytes, and its header says {end:,}")
    return tensors


def _no_safetensors(path: Path, head: bytes) -> CheckpointError:
    kind = "a pickle or an archive of pickles" if head.startswith((b"PK", b"\x80")) else "something else"
    return CheckpointError(str(path), "is no safetensors file", f"it begins like {kind}")


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    dtype, shape, (low, high) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, low, high)):
        raise ValueError(f"tensor {name!r:.100} has no whole numbers as shape and place")
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    if high - low != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r:.100} of shape {shape} does not have {high - low:,} bytes")
    return StoredTensor(path=path, dtype=dtype, shape=shape, strides=tuple(reversed(strides)), offset_bytes=start + low)
