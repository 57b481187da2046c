"""The tensors of a Hugging Face folder: their names and shapes checked, their rows read on demand.

8-bit weights come with a tensor of scales, one for each block of their rows and columns; such weights are read as
bfloat16, already multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object
from megatron_smartmoe.spec.readers.safetensors_files import read_header
from megatron_smartmoe.spec.readers.torch_save import StoredTensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SCALES = "_scale_inv"  # DeepSeek-V3's name of the scales behind the name of the weight
_SCALED_DTYPE = "bfloat16"  # of what is dequantised, as in the release's own fp8_cast_bf16.py
_SHOWN = 3  # names that a message lists


@dataclass(frozen=True, kw_only=True)
class HFTensors:
    """The tensors of a folder.

    Attributes:
        folder: that holds them.
        tensors: where each is, by name.
        block: rows and columns of a block with one scale; None where nothing is quantised.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, folder: Path, config: HFConfig) -> HFTensors:
        """Read the heads of a folder's files.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or files and index differ.
            ConfigError: the weights are quantised in a way that is not known here.
        """
        return cls(folder=folder, tensors=_read(folder), block=_block(config))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type of the numbers that `rows` gives."""
        dtype = self.tensors[name].dtype
        return _SCALED_DTYPE if dtype in numbers.FLOAT8 else dtype

    def rows(self, name: str, first: int, end: int) -> NDArray[Any]:
        """Some rows of a tensor, flat."""
        tensor = self.tensors[name]
        width = math.prod(tensor.shape[1:])
        found = tensor.read(first * width, end * width)
        if tensor.dtype not in numbers.FLOAT8:
            return found
        return numbers.converted(self._scaled(name, found, first, end), "float32", _SCALED_DTYPE)

    def check(self, table: ModelTable) -> None:
        """Every tensor of the table is there, of its shape, and nothing else is.

        Raises:
            CheckpointError: the first thing that is wrong.
        """
        names = {name for name in self.tensors if not name.endswith(_SCALES)}
        missing = [name for name in table.shapes if name not in names]
        if missing:
            raise CheckpointError(str(self.folder), "is incomplete", f"it has no tensor {_listed(missing)}")
        extra = [
            name
            for name in names
            if name not in table.shapes and name not in table.copies and not table.ignored.fullmatch(name)
        ]
        if extra:
            rule = f"a {table.family} model of this config.json has no tensor {_listed(sorted(extra))}"
            raise CheckpointError(str(self.folder), "does not match its config.json", rule)
        for name, shape in table.shapes.items():
            self._check_one(name, shape)
        for name, of in table.copies.items():
            if name in self.tensors:
                self._check_copy(name, of)

    def _check_copy(self, name: str, of: str) -> None:
        """A tensor that the model has once, and that the files have twice, is the same both times."""
        one, other = self.tensors[name], self.tensors[of]
        is_same = one.shape == other.shape and one.dtype == other.dtype
        blocks = zip(one.blocks(), other.blocks(), strict=True) if is_same else ()
        if not is_same or any(a.tobytes() != b.tobytes() for (_, a), (_, b) in blocks):
            rule = f"tensor {name} differs from {of}, and the model has only one of the two"
            raise CheckpointError(str(one.path), "does not match its config.json", rule)

    def _check_one(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self.tensors[name]
        if tensor.shape != shape:
            rule = f"tensor {name} has shape {list(tensor.shape)}, and by config.json {list(shape)}"
            raise CheckpointError(str(tensor.path), "does not match its config.json", rule)
        if tensor.dtype not in numbers.FLOATS and tensor.dtype not in numbers.FLOAT8:
            raise CheckpointError(str(tensor.path), "cannot be used", f"tensor {name} is of type {tensor.dtype}")
        if tensor.dtype in numbers.FLOAT8:
            scales = self.tensors.get(name + _SCALES)
            if scales is None or self.block is None or len(shape) != 2:
                rule = f"tensor {name} is of type {tensor.dtype}, without scales {name}{_SCALES}"
                raise CheckpointError(str(tensor.path), "cannot be used", rule)
            wanted = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))
            if scales.shape != wanted or scales.dtype != "float32":
                rule = f"{name}{_SCALES} is {scales.dtype} {list(scales.shape)}, where float32 {list(wanted)} is needed"
                raise CheckpointError(str(scales.path), "cannot be used", rule)

    def _scaled(self, name: str, found: NDArray[Any], first: int, end: int) -> NDArray[np.float32]:
        """Float8 rows times the scales of their blocks."""
        assert self.block is not None
        columns = self.shape(name)[1]
        block_rows, block_columns = self.block
        low, high = first // block_rows, -(-end // block_rows)
        scales = self.tensors[name + _SCALES]
        width = scales.shape[1]
        of_blocks = scales.read(low * width, high * width).reshape(-1, width)
        in_rows = of_blocks[np.arange(first, end) // block_rows - low]
        in_columns = np.repeat(in_rows, block_columns, axis=1)[:, :columns]
        values = numbers.as_float32(found, "float8_e4m3fn").reshape(end - first, columns)
        product: NDArray[np.float32] = (values * in_columns).reshape(-1)
        return product


def _read(folder: Path) -> Mapping[str, StoredTensor]:
    """The tensors of the files that the index names, or of the only one."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return read_header(folder / SINGLE_FILE)
    named = Named(path=index, field="SOURCE", way_out="Restore the file.")
    places = read_object(named).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(str(index), "is damaged", "it has no weight_map of names of files")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if "/" in name or not name.endswith(".safetensors"):
            raise CheckpointError(str(index), "is damaged", f"it names {name[:100]!r}, no safetensors file beside it")
        for tensor, where in read_header(folder / name).items():
            if tensor in found:
                raise CheckpointError(str(folder / name), "is one too many", f"tensor {tensor} is in two files")
            found[tensor] = where
    missing = [tensor for tensor in places if tensor not in found]
    if missing:
        rule = f"its index names tensor {_listed(missing)}, which no file has"
        raise CheckpointError(str(folder), "is incomplete", rule)
    return found


def _block(config: HFConfig) -> tuple[int, int] | None:
    """The size of a block with one scale."""
    content = config.get("quantization_config", None)
    if content is None:
        return None
    size = content.get("weight_block_size") if isinstance(content, dict) else None
    is_known = isinstance(content, dict) and content.get("quant_method") == "fp8"
    if not is_known or not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        rule = "is not supported: only fp8 weights with a scale for each block of weight_block_size are dequantised"
        raise config.refused("quantization_config", rule, "Pass the model in bfloat16.")
    return size[0], size[1]


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
