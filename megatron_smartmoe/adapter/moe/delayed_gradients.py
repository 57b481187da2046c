"""Weight gradients of the experts later than their inputs' (`--delay-wgrad-compute`).

Megatron's schedule of two micro-batches computes the weight gradients while the other micro-batch's tokens travel: it
calls `backward_dw` of the experts after their backward pass. Until then the operands are kept here; the backward pass
gives the weights no gradient, and Megatron's wrapper for data parallelism hooks the module instead of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_smartmoe.ops.grouped_linear import Groups, multiply_groups, weight_gradient


class DelayedGradients:
    """The weight gradients that are still to be computed, of the grouped GEMMs of one layer's home slots."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Groups]] = []
        self._hooks: list[Callable[[], object]] = []

    def linear(self, rows_NK: torch.Tensor, weight_SMK: torch.Tensor, groups: Groups) -> torch.Tensor:
        """`ops.grouped_linear`, whose backward pass leaves the weight's gradient to `compute`."""
        output: torch.Tensor = _DelayedLinear.apply(rows_NK, weight_SMK, groups, self)  # type: ignore[no-untyped-call]
        return output

    def keep(self, weight: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, groups: Groups) -> None:
        """Keep the operands of a weight's gradient."""
        self._pending.append((weight, rows, gradient, groups))

    def call_after(self, hook: Callable[[], object]) -> None:
        """Call `hook` when the gradients are there: it adds them to those of other micro-batches and reduces them."""
        self._hooks.append(hook)

    @torch.no_grad()
    def compute(self) -> None:
        """Compute what is pending, and pass it on."""
        pending, self._pending = self._pending, []
        for weight, rows_NK, gradient_NM, groups in pending:
            gradient_SMK = weight_gradient(gradient_NM, rows_NK, weight, groups)
            weight.grad = gradient_SMK if weight.grad is None else weight.grad + gradient_SMK
        for hook in self._hooks if pending else ():
            hook()


class _DelayedLinear(torch.autograd.Function):
    """A grouped GEMM whose weight gets its gradient later."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_NK: torch.Tensor,
        weight_SMK: torch.Tensor,
        groups: Groups,
        delayed: DelayedGradients,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_NK, weight_SMK)
        ctx.delayed, ctx.weight, ctx.groups = delayed, weight_SMK, groups
        return multiply_groups(rows_NK, weight_SMK.transpose(1, 2), groups)

    @staticmethod
    def backward(ctx: Any, gradient_NM: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        rows_NK, weight_SMK = ctx.saved_tensors
        gradient_NM = gradient_NM.contiguous()
        ctx.delayed.keep(ctx.weight, rows_NK, gradient_NM, ctx.groups)
        return multiply_groups(gradient_NM, weight_SMK, ctx.groups), None, None, None
