"""Rows: how a parameter of Megatron's is put together from tensors of another format, and taken apart again.

A tensor is a list of rows along its first axis; those of a tensor of one axis are its elements. A parameter of
Megatron's is a list of segments, each a run of rows of one other tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows of a tensor that follow each other in a parameter.

    Attributes:
        tensor: name of the tensor that they come from.
        first: their first row there.
        count: number of rows.
    """

    tensor: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one layer and expert, by the names of `checkpoint.names`.

    Attributes:
        name: with the layer's number.
        expert: logical expert; None for a parameter of no expert.
        shape: of the whole parameter.
        segments: the rows that make it, in order.
        is_float32: whether Megatron keeps it in float32 in a model of any type.
    """

    name: str
    expert: int | None
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    is_float32: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


def whole(tensor: str, num_rows: int) -> tuple[Segment, ...]:
    """A tensor as it is."""
    return (Segment(tensor=tensor, first=0, count=num_rows),)


def stacked(tensors: Sequence[str], num_rows: int) -> tuple[Segment, ...]:
    """Tensors of equal size, one below the other."""
    return tuple(Segment(tensor=tensor, first=0, count=num_rows) for tensor in tensors)


def by_query_group(query: str, key: str, value: str, *, heads: int, groups: int, head_size: int) -> tuple[Segment, ...]:
    """Queries, keys and values of a layer: for each query group its queries, its key, its value."""
    in_group = heads // groups * head_size
    segments = []
    for group in range(groups):
        segments.append(Segment(tensor=query, first=group * in_group, count=in_group))
        segments += [Segment(tensor=tensor, first=group * head_size, count=head_size) for tensor in (key, value)]
    return tuple(segments)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows that follow each other both in a parameter and in a tensor.

    Attributes:
        parameter: the parameter.
        at: their first row in the parameter.
        tensor: name of the tensor.
        first: their first row there.
        count: number of rows.
    """

    parameter: Parameter
    at: int
    tensor: str
    first: int
    count: int


def runs_of(parameter: Parameter, first: int = 0, end: int | None = None) -> Iterator[Run]:
    """Where the rows `first` to `end` of a parameter come from, in their order."""
    at, end = 0, parameter.num_rows if end is None else end
    for segment in parameter.segments:
        low, high = max(first, at), min(end, at + segment.count)
        if low < high:
            yield Run(
                parameter=parameter, at=low, tensor=segment.tensor, first=segment.first + low - at, count=high - low
            )
        at += segment.count


def by_tensor(parameters: Sequence[Parameter]) -> Mapping[str, list[Run]]:
    """The runs that make each of the other format's tensors, in the order of its rows."""
    found: dict[str, list[Run]] = {}
    for parameter in parameters:
        for run in runs_of(parameter):
            found.setdefault(run.tensor, []).append(run)
    for runs in found.values():
        runs.sort(key=lambda run: run.first)
    return found
