"""Long runs in few columns: means over stretches of iterations, and the worst moment of each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.trace import RoutingTrace

MOST_BINS = 160


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """Load of one layer over time, relative to the mean: 1 is an even share.

    Attributes:
        layer: its number, from 0.
        starts: first iteration of each of the B bins.
        expert_BE: load of each expert in the bin's most uneven record.
        rank_BR: load of each rank there, experts in Megatron's order.
        worst_B: max / mean tokens per rank in that record.
        mean_B: the mean of max / mean tokens per rank over the bin's records.
    """

    layer: int
    starts: IntArray
    expert_BE: FloatArray
    rank_BR: FloatArray
    worst_B: FloatArray
    mean_B: FloatArray


def loads_of(trace: RoutingTrace, num_ranks: int) -> list[Loads]:
    """The loads of every layer that has any, over all sources and micro-batches of a record.

    Args:
        trace: the counts.
        num_ranks: R of an expert-parallel group; it must divide the experts.
    """
    axes = (2,) if not trace.has_micro_batches else (2, 3)
    load_NLE = trace.counts.sum(axis=axes, dtype=np.int64).astype(np.float64)
    edges = np.unique(np.linspace(0, trace.num_records, min(MOST_BINS, trace.num_records) + 1).astype(np.int64))
    found = []
    for layer in range(trace.num_layers):
        load_NE = load_NLE[:, layer]
        if not load_NE.any():
            continue
        mean_N = np.maximum(load_NE.mean(axis=1), 1e-300)
        share_NE = load_NE / mean_N[:, None]
        rank_NR = share_NE.reshape(len(share_NE), num_ranks, -1).mean(axis=2)
        worst_N = rank_NR.max(axis=1)
        # The record of a bin in which a rank is busiest stands for it: a mean would hide what all ranks waited for.
        pairs = list(pairwise(edges.tolist()))
        picked = np.array([first + int(np.argmax(worst_N[first:last])) for first, last in pairs])
        found.append(
            Loads(
                layer=int(trace.layer[layer]),
                starts=trace.iteration[edges[:-1]],
                expert_BE=share_NE[picked],
                rank_BR=rank_NR[picked],
                worst_B=worst_N[picked],
                mean_B=np.array([worst_N[first:last].mean() for first, last in pairs]),
            )
        )
    return found
