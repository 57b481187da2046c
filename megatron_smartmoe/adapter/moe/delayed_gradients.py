"""Weight gradients of the experts later than their inputs', while tokens travel.

Megatron's schedule of two micro-batches computes them while the other micro-batch's tokens travel
(`--delay-wgrad-compute`); without it, they are computed beside the dispatch's backward pass of the same micro-batch
(`--overlap-dispatch-backward-with-experts-wgrad`). Both call `backward_dw` of the experts after their backward pass.
Until then the operands are kept here; the backward pass gives the weights no gradient, and Megatron's wrapper for data
parallelism hooks the module instead of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_smartmoe.adapter.moe import main_gradients
from megatron_smartmoe.ops.grouped_linear import Groups, weight_gradient


def are_delayed(config: Any) -> bool:
    """Whether `backward_dw` of the experts computes their weight gradients.

    Args:
        config: the transformer's configuration; a release of Megatron's may lack the younger option.
    """
    overlaps = getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False)
    return bool(config.delay_wgrad_compute or overlaps)


def taken_when_there(construct: Callable[..., None]) -> Callable[..., None]:
    """`DistributedDataParallel.__init__` that hooks the modules of delayed gradients with either option.

    Megatron's does so with `--delay-wgrad-compute` alone. With the other one it takes the weight gradients, and with
    `--overlap-grad-reduce` reduces them, in the backward pass, before they are computed.
    """

    @functools.wraps(construct)
    def constructed(wrapper: Any, config: Any, ddp_config: Any, *args: Any, **kwargs: Any) -> None:
        if are_delayed(config):
            ddp_config.delay_wgrad_compute = True
        construct(wrapper, config, ddp_config, *args, **kwargs)

    return constructed


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
