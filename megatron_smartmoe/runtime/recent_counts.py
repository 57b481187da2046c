"""Tokens per expert of the last few iterations, iteration by iteration, for a look at the pool.

Means over an interval would hide what a choice between planning from history and from the present is about. So the last
iterations are kept apart in a ring on the device, and of the latest one the first micro-batches too. Nothing is sent
before somebody asks; then it is one all-reduce, in which one group of expert-parallel ranks of each stage speaks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_smartmoe.spec.arrays import IntArray


class RecentCounts:
    """Counts of a sample of the model's layers.

    Args:
        layers: numbers of the sampled layers, the same on every rank; those that are elsewhere stay zero here.
        num_experts: E.
        iterations: I, that are remembered.
        micro_batches: B, of the latest iteration that are kept apart.
        device: where the routers run.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        *,
        iterations: int,
        micro_batches: int,
        device: torch.device | str | int,
    ) -> None:
        self.layers = tuple(layers)
        sizes = (len(self.layers), num_experts)
        self._totals_ILE = torch.zeros(iterations, *sizes, dtype=torch.int64, device=device)
        self._batches_BLE = torch.zeros(micro_batches, *sizes, dtype=torch.int64, device=device)
        self._seen_L = [0] * len(self.layers)
        self._at = 0
        self.ended = 0  # iterations that are complete

    def add(self, layer: int, routing_map_TE: torch.Tensor) -> None:
        """Count one micro-batch of one layer of the sample; `routing_map_TE` is bool `[tokens, E]`."""
        row = self.layers.index(layer)
        counts_E = routing_map_TE.sum(dim=0)
        self._totals_ILE[self._at, row] += counts_E
        if self._seen_L[row] < len(self._batches_BLE):
            self._batches_BLE[self._seen_L[row], row] = counts_E
        self._seen_L[row] += 1

    def end_iteration(self) -> None:
        """The next counts are of another iteration; the oldest one is forgotten."""
        self._seen_L = [0] * len(self.layers)
        self._at = (self._at + 1) % len(self._totals_ILE)
        self._totals_ILE[self._at] = 0
        self.ended += 1

    def collect(self, ep_rank: int, num_ranks: int, *, speaks: bool, shares: int) -> tuple[IntArray, IntArray]:
        """Before `end_iteration`: what one group routed. A collective call of all ranks; the host waits.

        Args:
            ep_rank: of this rank.
            num_ranks: R, of a group.
            speaks: whether this rank is of the group that is listened to.
            shares: ranks that route tokens of their own for one place in the group (expert tensor parallelism); the
                mean over them is returned.

        Returns:
            Counts `[I, L, E]` of the iterations that there were, the latest last, and `[B, L, R, E]` of its first
            micro-batches.
        """
        iterations, num_layers, num_experts = self._totals_ILE.shape
        batches = len(self._batches_BLE)
        sums = self._totals_ILE.new_zeros(iterations + batches * num_ranks, num_layers, num_experts)
        if speaks:
            sums[:iterations] = self._totals_ILE.roll(-1 - self._at, dims=0)
            sums[iterations:].view(batches, num_ranks, num_layers, num_experts)[:, ep_rank] = self._batches_BLE
        dist.all_reduce(sums)
        counts = np.rint(sums.cpu().numpy() / shares).astype(np.int64)
        batches_BRLE = counts[iterations:].reshape(batches, num_ranks, num_layers, num_experts)
        known = min(iterations, self.ended + 1)
        return counts[iterations - known : iterations], batches_BRLE.transpose(0, 2, 1, 3)
