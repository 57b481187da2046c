"""The parameters of a checkpoint and where their parts are, whatever format and layout they were saved in.

Everything is read on demand and a block at a time: what stays in memory is a line per part, not a number of the model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.checkpoint.digest import EXP_AVG, EXP_AVG_SQ, MAIN_WEIGHT, WEIGHT, Piece, combine, digest
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import BLOCK_ELEMENTS, StoredTensor

# What messages call the kinds of tensors.
WORDS = {WEIGHT: "weight", MAIN_WEIGHT: "main weight", EXP_AVG: "first moment", EXP_AVG_SQ: "second moment"}


class ParameterKey(NamedTuple):
    """One parameter of one layer and expert, or its optimizer state.

    Attributes:
        name: of the parameter, with the layer's number.
        expert: logical expert; None for a parameter of no expert.
        kind: one of `digest.KINDS`.
    """

    name: str
    expert: int | None
    kind: str

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.name}{expert}, {WORDS[self.kind]}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a parameter, in a file."""

    piece: Piece
    tensor: StoredTensor


@dataclass(kw_only=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        folder: of the checkpoint.
        parameters: the parts of each parameter and of its optimizer state.
        buffers: tensors that are no parameter's, by key: number of elements. The distributed optimizer's, when it was
            saved buffer by buffer, hold its state in an order that only the run knows.
        iteration: of the training; None if the checkpoint does not say.
        arguments: of the run that saved it.
    """

    folder: Path
    iteration: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parameters: dict[ParameterKey, list[Part]] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)

    def shape(self, key: ParameterKey) -> tuple[int, ...]:
        """The whole parameter's."""
        return self.parameters[key][0].piece.shape

    def dtype(self, key: ParameterKey) -> str:
        """Torch's name of its element type, without "torch."."""
        return self.parameters[key][0].tensor.dtype

    def missing_elements(self, key: ParameterKey) -> int:
        """Elements of the whole parameter that no part has, or, if negative, that two parts have."""
        parts = self.parameters[key]
        return math.prod(self.shape(key)) - sum(part.piece.num_elements for part in parts)

    def digest(self, key: ParameterKey) -> int:
        """The parameter's digest (see `checkpoint.digest`)."""
        return combine(_digest_of(part) for part in self.parameters[key])

    def row_blocks(self, key: ParameterKey) -> Iterator[tuple[int, int]]:
        """Ranges of the first axis that `rows` gives in one go without taking much memory."""
        shape = self.shape(key)
        num_rows = shape[0] if shape else 1
        step = max(1, BLOCK_ELEMENTS // max(math.prod(shape[1:]), 1))
        for first in range(0, num_rows, step):
            yield first, min(first + step, num_rows)

    def rows(self, key: ParameterKey, first: int, end: int) -> NDArray[Any]:
        """Elements of some rows of the whole parameter, flat; bfloat16 and 8-bit floats as unsigned integers."""
        shape = self.shape(key) or (1,)
        whole: NDArray[Any] | None = None
        for part in self.parameters[key]:
            offsets, sizes = part.piece.offsets or (0,), part.piece.sizes or (1,)
            low, high = max(first, offsets[0]), min(end, offsets[0] + sizes[0])
            if low >= high:
                continue
            width = math.prod(sizes[1:])
            numbers = part.tensor.read((low - offsets[0]) * width, (high - offsets[0]) * width)
            if numbers.size == (end - first) * math.prod(shape[1:]):
                return numbers  # one part has all of them
            if whole is None:
                whole = np.zeros((end - first, *shape[1:]), numbers.dtype)
            inner = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
            whole[(slice(low - first, high - first), *inner)] = numbers.reshape(high - low, *sizes[1:])
        if whole is None:
            raise CheckpointError(str(self.folder), "is incomplete", f"it has no rows {first} to {end} of {key}")
        return whole.reshape(-1)


def arguments_in(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saving run's arguments in a checkpoint's common state, by name."""
    args = common.get("args")
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def iteration_in(common: Mapping[str, Any]) -> int | None:
    """The iteration in a checkpoint's common state."""
    iteration = common.get("iteration")
    return iteration if isinstance(iteration, int) else None


def as_numbers(elements: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Elements as numbers that numpy computes with: bfloat16 as float32.

    Raises:
        KeyError: numpy has no such type.
    """
    if dtype == "bfloat16":
        return (elements.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype.startswith("float8"):
        raise KeyError(dtype)
    return elements


def by_parameter(contents: Contents) -> Mapping[tuple[str, int | None], list[str]]:
    """Kinds that a checkpoint has of each parameter and expert."""
    kinds: dict[tuple[str, int | None], list[str]] = {}
    for key in contents.parameters:
        kinds.setdefault((key.name, key.expert), []).append(key.kind)
    return kinds


def _digest_of(part: Part) -> int:
    """A part's digest, read a block at a time."""
    whole = part.piece
    return combine(
        digest(
            block,
            part.tensor.dtype,
            Piece(shape=whole.shape, offsets=whole.offsets, sizes=whole.sizes, start=start, stop=start + block.size),
        )
        for start, block in part.tensor.blocks()
    )
