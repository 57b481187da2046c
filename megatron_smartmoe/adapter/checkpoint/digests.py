"""Digests of the model and the optimizer, over all ranks: each digests what it holds, one of them adds them up.

A GPU computes them itself, in a small part of the time that the copy to the host takes: the work is enqueued when a
save begins, on the stream of the training, so that nothing which is enqueued later can overwrite what it reads. On CPU
ranks a thread computes them; the op lets other threads run, and takes no thread of torch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_smartmoe.adapter.checkpoint.held import Held
from megatron_smartmoe.checkpoint.digest import MODULUS
from megatron_smartmoe.checkpoint.manifest import ParameterDigest
from megatron_smartmoe.runtime.tensor_digest import digest_of_tensor, start_digest


@dataclass(frozen=True, kw_only=True, order=True)
class _Entry:
    """One parameter of one layer, all of its experts."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_experts: int  # 0 for a parameter of no expert

    @property
    def num_sums(self) -> int:
        return max(self.num_experts, 1)


@dataclass(frozen=True, kw_only=True)
class DigestPart:
    """What one rank adds to the digests, as it is sent.

    Attributes:
        entries: the parameters in the order of their sums, as JSON; the same text on all ranks of a pipeline stage.
        places: index of each sum that is not 0.
        values: these sums, uint64.
    """

    entries: str
    places: NDArray[np.int64]
    values: NDArray[np.uint64]


class LocalDigests:
    """What this rank adds to each digest.

    What is on a device is enqueued here; `compute` does the rest.

    Args:
        held: what this rank holds.
        num_experts: E, the logical experts of a layer.
    """

    def __init__(self, held: Sequence[Held], num_experts: int) -> None:
        found = {
            _Entry(
                name=part.name,
                kind=part.kind,
                dtype=part.dtype,
                shape=part.piece.shape,
                num_experts=0 if part.expert is None else num_experts,
            )
            for part in held
        }
        self._entries = sorted(found)
        places = _places(self._entries)
        parts = [(places[part.name, part.kind] + (part.expert or 0), part) for part in held if part.tensor is not None]
        on_device = [(place, part) for place, part in parts if part.tensor is not None and part.tensor.is_cuda]
        self._on_host = [(place, part) for place, part in parts if part.tensor is not None and not part.tensor.is_cuda]
        self._on_device = _OnDevice(on_device) if on_device else None
        self._values = np.zeros(sum(entry.num_sums for entry in self._entries), np.uint64)
        self._has_read = threading.Event()

    def compute(self) -> None:
        """Compute them. For one thread; another may `wait` until tensors may change."""
        try:
            self._compute_on_host()
        finally:
            self._on_host = []  # nothing else keeps tensors of an optimizer that are replaced
            self._has_read.set()
        if self._on_device is not None:
            self._on_device.add_to(self._values)
            self._on_device = None

    def wait(self) -> None:
        """Return when `compute` reads this host's tensors no more, whatever has come of it."""
        self._has_read.wait()

    def part(self) -> DigestPart:
        """What this rank adds, once `compute` has returned."""
        places = np.flatnonzero(self._values)
        return DigestPart(
            entries=json.dumps([astuple(entry) for entry in self._entries]),
            places=places,
            values=self._values[places],
        )

    def _compute_on_host(self) -> None:
        for place, part in self._on_host:
            assert part.tensor is not None
            total = int(self._values[place]) + digest_of_tensor(part.tensor, part.piece)
            self._values[place] = total % MODULUS


class _OnDevice:
    """Sums that a GPU computes. Enqueued here; the host does not wait before `add_to`."""

    def __init__(self, parts: Sequence[tuple[int, Held]]) -> None:
        self._places = np.array([place for place, _ in parts])
        sums = [start_digest(part.tensor, part.piece) for _, part in parts if part.tensor is not None]
        self._sums = torch.stack(sums).to("cpu", non_blocking=True)  # to pinned memory
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def add_to(self, values: NDArray[np.uint64]) -> None:
        """Wait for the device, and add them: several may have one place."""
        self._done.synchronize()
        np.add.at(values, self._places, self._sums.numpy().view(np.uint64))


def _places(entries: Sequence[_Entry]) -> dict[tuple[str, str], int]:
    """Index of the first sum of each entry."""
    places, index = {}, 0
    for entry in entries:
        places[entry.name, entry.kind] = index
        index += entry.num_sums
    return places


def _read_entries(text: str) -> list[_Entry]:
    return [
        _Entry(name=name, kind=kind, dtype=dtype, shape=tuple(shape), num_experts=num_experts)
        for name, kind, dtype, shape, num_experts in json.loads(text)
    ]


def combined(parts: Iterable[DigestPart]) -> tuple[ParameterDigest, ...]:
    """The digests of all parameters, from what all ranks add to them."""
    # Step 1: ranks of a stage hold the same parameters; their sums are added as they are.
    stages: dict[str, tuple[list[_Entry], NDArray[np.uint64]]] = {}
    for part in parts:
        if part.entries not in stages:
            entries = _read_entries(part.entries)
            stages[part.entries] = entries, np.zeros(sum(entry.num_sums for entry in entries), np.uint64)
        stages[part.entries][1][part.places] += part.values
    # Step 2: what several stages hold, such as tied embeddings.
    totals: dict[_Entry, NDArray[np.uint64]] = {}
    for entries, values in stages.values():
        ends = np.cumsum([entry.num_sums for entry in entries])
        for entry, end in zip(entries, ends, strict=True):
            own = values[end - entry.num_sums : end]
            totals[entry] = totals[entry] + own if entry in totals else own
    return tuple(
        ParameterDigest(
            name=entry.name,
            kind=entry.kind,
            dtype=entry.dtype,
            shape=entry.shape,
            digests=tuple(totals[entry].tolist()),
        )
        for entry in sorted(totals)
    )
