"""What a layer's micro-batches of one iteration looked like: for the next plan, and for the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.spec.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch of one layer.

    Attributes:
        load_E: tokens of each expert, of the whole group.
        homes_R: tokens of each rank if homes alone computed them.
        split_R: tokens of each rank as they were split.
        num_copies: replicas that took tokens.
    """

    load_E: IntArray
    homes_R: IntArray
    split_R: IntArray
    num_copies: int

    @property
    def imbalance(self) -> tuple[float, float]:
        """Max / mean tokens per rank without and with copies."""
        homes, split = (float(load_R.max() / max(load_R.mean(), 1e-300)) for load_R in (self.homes_R, self.split_R))
        return homes, split


class LayerTally:
    """Collects the micro-batches of one layer."""

    def __init__(self) -> None:
        self._record: list[MicroBatch] = []

    def add(self, counts_RE: IntArray, sent_RRS: IntArray) -> None:
        """One micro-batch; experts by their homes. See `split_tokens` for the axes."""
        load_E, num_ranks = counts_RE.sum(axis=0), len(counts_RE)
        taken_RS = sent_RRS.sum(axis=0)
        home_slots = len(load_E) // num_ranks
        self._record.append(
            MicroBatch(
                load_E=load_E,
                homes_R=load_E.reshape(num_ranks, -1).sum(axis=1),
                split_R=taken_RS.sum(axis=1),
                num_copies=int((taken_RS[:, home_slots:] > 0).sum()),
            )
        )

    def take(self) -> list[MicroBatch]:
        """The micro-batches since the last call."""
        record, self._record = self._record, []
        return record


def imbalance(records: Sequence[Sequence[MicroBatch]]) -> tuple[float, float]:
    """Max / mean tokens per rank without and with copies, averaged over micro-batches and layers."""
    without, with_copies = np.mean([micro.imbalance for record in records for micro in record], axis=0).tolist()
    return without, with_copies


def balance_line(iteration: int, layers: Sequence[int], records: Sequence[Sequence[MicroBatch]]) -> str:
    """One line of JSON about an iteration: `homes` and `split`, max / mean tokens per rank of each micro-batch by
    layer, and `copies`, replicas that took tokens.

    Args:
        iteration: of the training.
        layers: number of each layer.
        records: the micro-batches of each.
    """
    content = {
        "iteration": iteration,
        "layers": list(layers),
        "homes": [[micro.imbalance[0] for micro in record] for record in records],
        "split": [[micro.imbalance[1] for micro in record] for record in records],
        "copies": [[micro.num_copies for micro in record] for record in records],
    }
    return json.dumps(content)
