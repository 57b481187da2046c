"""Weight gradients added to Megatron's float32 `main_grad` as they are computed.

Megatron does this with TransformerEngine's and apex's kernels (`gradient_accumulation_fusion`, which is on where one of
them is installed). The gradient of each micro-batch is then not rounded to the type of the weights before it is added,
and no tensor of the size of the weights is made for it. Where the weights are float32 nothing would be rounded; there
autograd adds gradients, as ever, so that no bit changes.

Megatron's wrapper for data parallelism adds `weight.grad` to `main_grad` in a hook behind autograd's accumulation,
unless `grad_added_to_main_grad` is set; it wants a `grad` all the same where it overlaps the reduction. And autograd
must get a tensor on the GPU: what waits for an undefined gradient alone is run by another thread, and so would be the
collectives behind it, in an order that differs from rank to rank. So a tensor that nobody reads takes the gradient's
way.
"""

from __future__ import annotations

import functools

import torch

from megatron_smartmoe.ops.grouped_linear import Groups, add_weight_gradient


def is_wider(weight: torch.Tensor) -> bool:
    """Whether the weight has a float32 `main_grad` that rounds less than its own type."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and main_grad.dtype == torch.float32 and weight.dtype != torch.float32


def add(weight: torch.Tensor, rows_NK: torch.Tensor, gradient_NM: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Add a weight's gradient to its `main_grad`, and tell Megatron's hooks.

    Returns:
        What autograd gets: for a parameter unwritten memory, which autograd takes over without reading it and the hook
        lets go; for a replica's weight zeros without memory, which may be added to its sums.
    """
    add_weight_gradient(weight.main_grad, gradient_NM, rows_NK, groups)  # type: ignore[attr-defined]
    if not weight.is_leaf:
        return _zero(weight.dtype, weight.device).expand_as(weight)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    needs_zeros = getattr(weight, "zero_out_wgrad", False)  # then the hook adds it all the same
    return torch.zeros_like(weight) if needs_zeros else torch.empty_like(weight)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)
