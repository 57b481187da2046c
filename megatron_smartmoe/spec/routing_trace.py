"""RoutingTrace: how many tokens each rank routed to each expert, record by record.

File format (`.npz`, readable without this project): `counts` unsigned int `[iterations, layers, source_ranks,
experts]`, with an optional micro-batch axis before `experts`; assignments (tokens x top-k) by logical expert, before
dropping. `iteration` and `layer` (global layer number) int64; `meta` a JSON string with `version, experts, top_k,
source_ranks, source`. Counts by source rank, not totals: the split and the all-to-all depend on where tokens come
from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, PlanError, shown
from megatron_smartmoe.spec.arrays import IntArray

VERSION = 1
MOST_EXPERTS = 65_536
MOST_LAYERS = 10_000
MOST_COUNT = 2**32 - 1  # of one rank, layer and expert: sums over all of them fit into 64 bits


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing counts of a run.

    Attributes:
        counts: unsigned `[N, L, source ranks, E]` or, with micro-batches, `[N, L, source ranks, M, E]`.
        iteration: training iteration of each record, `[N]`, increasing.
        layer: global number of each layer, `[L]`.
        meta: `experts`, `top_k`, `source_ranks`, `source`, and anything else worth keeping.
        notes: what an import left out or assumed, a sentence each.
    """

    counts: NDArray[Any]
    iteration: IntArray
    layer: IntArray
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts, iteration, layer = self.counts, self.iteration, self.layer
        if counts.ndim not in (4, 5) or 0 in counts.shape:
            raise PlanError(f"trace counts must have 4 or 5 axes, none of them empty, got shape {counts.shape}")
        if counts.dtype.kind not in "ui":
            raise PlanError(f"trace counts must be whole numbers, got {counts.dtype}")
        if counts.dtype.kind == "i" and (counts < 0).any():
            at = tuple(int(i) for i in np.argwhere(counts < 0)[0])
            raise PlanError(f"trace counts{list(at)} = {counts[at]}: must not be negative")
        if int(counts.max()) > MOST_COUNT:
            raise PlanError(f"trace counts have {int(counts.max())}: must be at most {MOST_COUNT}")
        for name, most, found in (
            ("experts", MOST_EXPERTS, counts.shape[-1]),
            ("layers", MOST_LAYERS, counts.shape[1]),
        ):
            if found > most:
                raise PlanError(f"trace counts have {found:,} {name}: must be at most {most:,}")
        for name, values, length in (("iteration", iteration, counts.shape[0]), ("layer", layer, counts.shape[1])):
            if values.shape != (length,):
                raise PlanError(f"trace {name} has shape {values.shape}, counts say ({length},)")
        late = np.nonzero(np.diff(iteration) <= 0)[0]
        if len(late):
            record = int(late[0]) + 1
            raise PlanError(f"trace iteration[{record}] = {iteration[record]}: must be above the one before it")
        if len(np.unique(layer)) < len(layer):
            raise PlanError("trace layer names a layer twice")
        for name, found in (("experts", counts.shape[-1]), ("source_ranks", counts.shape[2])):
            if self.meta.get(name, found) != found:
                raise PlanError(f"trace meta {name} = {shown(self.meta[name])}: counts have {found}")

    @property
    def num_records(self) -> int:
        """N."""
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.counts.shape[1])

    @property
    def num_sources(self) -> int:
        """Source ranks, over all expert-parallel groups of the pipeline stage."""
        return int(self.counts.shape[2])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[-1])

    @property
    def has_micro_batches(self) -> bool:
        """Whether micro-batches are kept apart."""
        return self.counts.ndim == 5

    def num_micro_batches(self, record: int) -> int:
        """Micro-batches of a record; a record with fewer than others ends with empty ones, which are not counted."""
        if not self.has_micro_batches:
            return 1
        filled_M = self.counts[record].any(axis=(0, 1, 3))
        return int(np.flatnonzero(filled_M)[-1]) + 1 if filled_M.any() else 0

    @property
    def total(self) -> int:
        """Assignments of all records."""
        return int(self.counts.sum(dtype=np.int64))

    def groups(self, num_ranks: int, record: int | slice = slice(None)) -> NDArray[np.int64]:
        """Counts by group of `num_ranks` source ranks, `[N, L, G, M, R, E]`; M is 1 without micro-batches.

        Consecutive source ranks form a group. Fewer source ranks than `num_ranks` are spread: each one's tokens are
        shared evenly by R / source_ranks consecutive ranks, remainders to the first.

        Args:
            num_ranks: R.
            record: which records; for a single one the first axis is left out.
        """
        counts = self.counts[record].astype(np.int64)
        if not self.has_micro_batches:
            counts = counts[..., None, :]
        *front, num_sources, num_micro, num_experts = counts.shape
        if num_sources % num_ranks == 0:
            grouped = counts.reshape(*front, num_sources // num_ranks, num_ranks, num_micro, num_experts)
        elif num_ranks % num_sources == 0:
            parts = num_ranks // num_sources
            spread = (counts[..., None, :, :] + np.arange(parts)[::-1, None, None]) // parts
            grouped = spread.reshape(*front, 1, num_ranks, num_micro, num_experts)
        else:
            rule = f"must divide, or be a multiple of, the trace's {num_sources} source ranks"
            raise ConfigError("--ep", num_ranks, rule, f"For example: {math.gcd(num_ranks, num_sources)}.")
        return np.swapaxes(grouped, -3, -2)

    def save(self, path: Path) -> None:
        """Write the `.npz` file."""
        meta = {
            **self.meta,
            "version": VERSION,
            "experts": self.num_experts,
            "source_ranks": self.num_sources,
        }
        counts = self.counts.astype(np.min_scalar_type(int(self.counts.max())))
        np.savez_compressed(path, counts=counts, iteration=self.iteration, layer=self.layer, meta=json.dumps(meta))
