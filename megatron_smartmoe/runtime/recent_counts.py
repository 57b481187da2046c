"""Tokens per expert of the last few iterations, iteration by iteration, from which the pool is re-evaluated.

Means over an interval would hide the difference between replicas planned from history and from the present. So the last
iterations are kept apart in a ring on the device, and of the latest one the first micro-batches too. Nothing is sent
between two re-evaluations; at each of them there is one all-reduce, to which one expert-parallel group of each stage
contributes its counts and all others contribute zeros.
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
        layers: Numbers of the sampled layers, the same on every rank; layers on other stages stay zero here.
        num_experts: E, the logical experts.
        iterations: I, the iterations that are kept.
        micro_batches: B, the first micro-batches of the latest iteration, which are kept apart.
        device: The device that the routers run on.
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
        self._row = 0  # of the current iteration in the ring
        self.ended = 0  # number of complete iterations

    def add(self, layer: int, counts_E: torch.Tensor) -> None:
        """Add the tokens of each expert in one micro-batch of one layer of the sample."""
        index = self.layers.index(layer)
        self._totals_ILE[self._row, index] += counts_E
        if self._seen_L[index] < len(self._batches_BLE):
            self._batches_BLE[self._seen_L[index], index] = counts_E
        self._seen_L[index] += 1

    def end_iteration(self) -> None:
        """Start the next iteration in the place of the oldest one."""
        self._seen_L = [0] * len(self.layers)
        self._row = (self._row + 1) % len(self._totals_ILE)
        self._totals_ILE[self._row] = 0
        self.ended += 1

    def collect(self, ep_rank: int, num_ranks: int, *, is_reporter: bool, shares: int) -> tuple[IntArray, IntArray]:
        """Reduce the counts of one expert-parallel group, before `end_iteration`. A collective call; the host waits.

        Args:
            ep_rank: This rank's place in its expert-parallel group.
            num_ranks: R, the ranks of such a group.
            is_reporter: Whether this rank belongs to the group whose counts are returned.
            shares: Number of ranks that route tokens of their own for one place in the group (expert tensor
                parallelism); the mean over them is returned.

        Returns:
            Counts `[I, L, E]` of the iterations so far, the latest last, and `[B, L, R, E]` of its first micro-batches.
        """
        iterations, num_layers, num_experts = self._totals_ILE.shape
        batches = len(self._batches_BLE)
        sums = self._totals_ILE.new_zeros(iterations + batches * num_ranks, num_layers, num_experts)
        if is_reporter:
            sums[:iterations] = self._totals_ILE.roll(-1 - self._row, dims=0)
            sums[iterations:].view(batches, num_ranks, num_layers, num_experts)[:, ep_rank] = self._batches_BLE
        dist.all_reduce(sums)
        counts = np.rint(sums.cpu().numpy() / shares).astype(np.int64)
        batches_BRLE = counts[iterations:].reshape(batches, num_ranks, num_layers, num_experts)
        known = min(iterations, self.ended + 1)
        return counts[iterations - known : iterations], batches_BRLE.transpose(0, 2, 1, 3)
