"""Counts of many iterations on the device, and their way to the rank that writes the routing trace.

Each iteration's counts stay where they were counted. Every `capacity` iterations all ranks send theirs to one rank:
one gather per window, none per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

_WINDOW_BYTES = 256 * 2**20  # bound of one window of all ranks in the memory of the writing rank
_LONGEST_WINDOW = 100  # iterations, which a run that is killed may lose


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank's counts belong in the trace: its source rank, and the layers in the rows of its counts."""

    source: int
    layers: tuple[int, ...]


class TraceBuffer:
    """Keeps this rank's counts, iteration by iteration.

    Args:
        place: Where this rank's counts belong. Ranks with the same source are summed (expert tensor parallelism).
        num_experts: E, the logical experts.
        passes: P, the passes through a layer that an iteration keeps apart; None for their sum.
        device: The device that the routers run on.
        writer: Global rank that receives the counts of all ranks.
    """

    def __init__(
        self,
        place: Place,
        num_experts: int,
        device: torch.device | str | int,
        *,
        passes: int | None = None,
        writer: int = 0,
    ) -> None:
        cell = (num_experts,) if passes is None else (passes, num_experts)
        self._writer, self._is_writer = writer, dist.get_rank() == writer
        self._places = self._gathered(place)
        shared = [self._places]
        dist.broadcast_object_list(shared, src=writer)
        assert shared[0] is not None
        cells = sum(len(other.layers) for other in shared[0]) * math.prod(cell)  # counts of all ranks in one iteration
        self.capacity = max(1, min(_LONGEST_WINDOW, _WINDOW_BYTES // (8 * max(1, cells))))
        sizes = (self.capacity, len(place.layers), *cell)
        self._counts_NLPE = torch.zeros(sizes, dtype=torch.int64, device=device)  # without P where they are summed
        self._iterations: list[int] = []

    def add(self, iteration: int, counts_LPE: torch.Tensor) -> None:
        """Keep the counts of one iteration, of the layers of this rank, `[L, E]` or `[L, P, E]`, on the device."""
        self._counts_NLPE[len(self._iterations)] = counts_LPE
        self._iterations.append(iteration)

    @property
    def is_full(self) -> bool:
        """Whether `collect` has to be called before the next `add`."""
        return len(self._iterations) == self.capacity

    def collect(self) -> tuple[list[int], NDArray[np.int64], list[int]] | None:
        """Empty the buffers of all ranks. A collective call.

        Returns:
            On the writer: iterations, counts `[N, L, source ranks, E]` (with P before E where passes are kept apart),
            global layer numbers; elsewhere None.
        """
        iterations, self._iterations = self._iterations, []
        parts = self._gathered(self._counts_NLPE[: len(iterations)].cpu().numpy())
        if parts is None or self._places is None:
            return None
        layers = sorted({layer for place in self._places for layer in place.layers})
        num_sources = 1 + max(place.source for place in self._places)
        shape = (len(iterations), len(layers), num_sources, *self._counts_NLPE.shape[2:])
        counts = np.zeros(shape, dtype=np.int64)
        for place, part_NLPE in zip(self._places, parts, strict=True):
            rows = [layers.index(layer) for layer in place.layers]
            counts[:, rows, place.source] += part_NLPE
        return iterations, counts, layers

    def _gathered(self, value: Any) -> list[Any] | None:
        """The values of all ranks by global rank on the writer; None elsewhere. A collective call."""
        everything: list[Any] | None = [None] * dist.get_world_size() if self._is_writer else None
        dist.gather_object(value, everything, dst=self._writer)
        return everything
