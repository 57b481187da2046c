"""Loads of a layer's micro-batches in one iteration, for the next plan and for the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.spec.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The loads of one layer in one micro-batch, over the whole expert-parallel group.

    Attributes:
        load_E: Tokens of each expert.
        homes_R: Tokens of each rank if homes alone computed them.
        split_R: Tokens of each rank as they were split.
        num_replicas: Number of replicas that took tokens.
        replanned_RS: The slots, where the replicas were planned anew for this micro-batch instead of those from
            history; else None.
        before_tokens: Tokens of the busiest rank with those from history, where they were planned anew.
    """

    load_E: IntArray
    homes_R: IntArray
    split_R: IntArray
    num_replicas: int
    replanned_RS: IntArray | None = None
    before_tokens: int = 0

    @property
    def imbalance(self) -> tuple[float, float]:
        """Max / mean tokens per rank without and with replicas; 1 without tokens."""
        if not self.load_E.any():
            return 1.0, 1.0
        homes, split = (float(load_R.max() / load_R.mean()) for load_R in (self.homes_R, self.split_R))
        assert min(homes, split) >= 1 - 1e-9, f"a maximum below the mean: {homes}, {split}"
        return homes, split


class LayerTally:
    """Collects the loads of one layer, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._record: list[MicroBatch] = []

    def add(self, load: MicroBatch) -> None:
        """Add one micro-batch, experts numbered by their homes."""
        self._record.append(load)

    @property
    def so_far(self) -> list[MicroBatch]:
        """The micro-batches since the last call of `take`."""
        return list(self._record)

    def take(self) -> list[MicroBatch]:
        """Return the micro-batches since the last call, and start anew."""
        record, self._record = self._record, []
        return record


def loads(record: Sequence[MicroBatch], passes: int) -> IntArray:
    """Tokens of each expert in each micro-batch of a layer, `[M, E]`.

    Args:
        record: What the layer's tally took.
        passes: Entries of `record` per micro-batch: a layer that a micro-batch goes through several times has several.
    """
    load_PE = np.stack([micro.load_E for micro in record])
    load_ME: IntArray = load_PE.reshape(-1, passes, load_PE.shape[1]).sum(axis=1)
    return load_ME


def imbalance(records: Sequence[Sequence[MicroBatch]]) -> tuple[float, float]:
    """Max / mean tokens per rank without and with replicas, averaged over micro-batches and layers with tokens."""
    found = [micro.imbalance for record in records for micro in record if micro.load_E.any()]
    without, with_replicas = np.mean(found or [(1.0, 1.0)], axis=0).tolist()
    return without, with_replicas


def balance_line(
    iteration: int, layers: Sequence[int], records: Sequence[Sequence[MicroBatch]], sent_bytes: tuple[int, int]
) -> str:
    """One line of JSON about an iteration, by layer and micro-batch.

    `homes` and `split` are max / mean tokens per rank without and with replicas; `copies` is the number of replicas
    that took tokens, `anew` whether they were planned anew for the micro-batch instead of those from history.

    Args:
        iteration: The training iteration.
        layers: The number of each layer.
        records: The micro-batches of each layer.
        sent_bytes: Weights and gradients of replicas that the group has sent since the line before.
    """
    content = {
        "iteration": iteration,
        "layers": list(layers),
        "homes": [[micro.imbalance[0] for micro in record] for record in records],
        "split": [[micro.imbalance[1] for micro in record] for record in records],
        "copies": [[micro.num_replicas for micro in record] for record in records],
        "anew": [[micro.replanned_RS is not None for micro in record] for record in records],
        "weight_bytes": sent_bytes[0],
        "gradient_bytes": sent_bytes[1],
    }
    return json.dumps(content)
