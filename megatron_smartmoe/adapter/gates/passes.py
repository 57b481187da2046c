"""Which micro-batch a router is called for: Megatron does not say."""

from __future__ import annotations

from collections import Counter

import torch

from megatron_smartmoe.errors import CompatError


class Passes:
    """Counts the passes of one router through an iteration.

    Activation checkpoints run a layer without gradients, and once more with them in the backward pass; schedules go
    through the micro-batches of a layer in the same order both times. So each kind of pass counts by itself.
    """

    def __init__(self) -> None:
        self._num_micro_batches: int | None = None
        self._done: Counter[bool] = Counter()  # with gradients or without -> passes in this iteration

    def begin(self, num_micro_batches: int) -> None:
        """Start an iteration."""
        self._num_micro_batches = num_micro_batches
        self._done.clear()

    def next(self) -> int:
        """The micro-batch of this pass; call it once in each.

        Raises:
            CompatError: no iteration was started.
        """
        if self._num_micro_batches is None:
            raise CompatError(
                "--smartmoe-gate: the model was called before an iteration started, so its random numbers and "
                "residuals are not defined. Train with Megatron's loop, or tell a session of your own loop where it is."
            )
        with_gradients = torch.is_grad_enabled()
        number = self._done[with_gradients]
        self._done[with_gradients] += 1
        return number % self._num_micro_batches  # beyond: the iteration is run again
