"""Weight gradients of the experts later than their inputs' (`--delay-wgrad-compute`).

Megatron's schedule of two micro-batches computes the weight gradients while the other micro-batch's tokens travel: it
calls `backward_dw` of the experts after their backward pass. Until then the operands are kept here; the backward pass
gives the weights no gradient, and Megatron's wrapper for data parallelism hooks the module instead of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_smartmoe.adapter.moe import main_gradients
from megatron_smartmoe.ops.grouped_linear import Groups, weight_gradient


class DelayedGradients:
    """The weight gradients that are still to be computed, of the grouped GEMMs of one layer's home slots.

    Args:
        accumulates: whether gradients are added to a `main_grad` that is wider; see `main_gradients`.
    """

    def __init__(self, *, accumulates: bool = False) -> None:
        self._accumulates = accumulates
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Groups]] = []
        self._hooks: list[Callable[[], object]] = []

    def keep(self, weight: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, groups: Groups) -> None:
        """Keep the operands of a weight's gradient: what takes it in `ops.grouped_linear`."""
        self._pending.append((weight, rows, gradient, groups))

    def call_after(self, hook: Callable[[], object]) -> None:
        """Call `hook` when the gradients are there: it adds them to those of other micro-batches and reduces them."""
        self._hooks.append(hook)

    @torch.no_grad()
    def compute(self) -> None:
        """Compute what is pending, and pass it on."""
        pending, self._pending = self._pending, []
        for weight, rows_NK, gradient_NM, groups in pending:
            if self._accumulates and main_gradients.is_wider(weight):
                weight.grad = main_gradients.add(weight, rows_NK, gradient_NM, groups).detach()
                continue
            gradient_SMK = weight_gradient(gradient_NM, rows_NK, weight, groups)
            weight.grad = gradient_SMK if weight.grad is None else weight.grad + gradient_SMK
        for hook in self._hooks if pending else ():
            hook()
