"""torch.ops.smartmoe_triton.*: the kernels of `grouped_triton` as torch ops, so that meta tensors and traces have them.

They are a namespace of their own, because the compiled library has no part in them. Triton is imported when one is
called: on the CPU nobody needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    "multiply": "(Tensor rows_NK, Tensor weight_SKM, Tensor ends_S) -> Tensor",
    "weight_gradient": "(Tensor grad_NM, Tensor rows_NK, Tensor ends_S) -> Tensor",
    "add_weight_gradient": "(Tensor(a!) total_SMK, Tensor grad_NM, Tensor rows_NK, Tensor ends_S) -> ()",
}


def multiply(rows_NK: Tensor, weight_SKM: Tensor, ends_S: Tensor) -> Tensor:
    """Rows of group s times `weight_SKM[s]`, `[N, M]`."""
    from megatron_smartmoe.ops import grouped_triton

    return grouped_triton.multiply(rows_NK, weight_SKM, ends_S)


def weight_gradient(grad_NM: Tensor, rows_NK: Tensor, ends_S: Tensor) -> Tensor:
    """For each group its gradient's rows, transposed, times its rows, `[S, M, K]`."""
    from megatron_smartmoe.ops import grouped_triton

    out_SMK = _gradients_like(grad_NM, rows_NK, ends_S)
    grouped_triton.weight_gradient(grad_NM, rows_NK, ends_S, out_SMK, adds=False)
    return out_SMK


def add_weight_gradient(total_SMK: Tensor, grad_NM: Tensor, rows_NK: Tensor, ends_S: Tensor) -> None:
    """Add `weight_gradient` to float32 sums, unrounded."""
    from megatron_smartmoe.ops import grouped_triton

    grouped_triton.weight_gradient(grad_NM, rows_NK, ends_S, total_SMK, adds=True)


def _gradients_like(grad_NM: Tensor, rows_NK: Tensor, ends_S: Tensor) -> Tensor:
    return grad_NM.new_empty(ends_S.shape[0], grad_NM.shape[1], rows_NK.shape[1])


def _register() -> Any:
    """Register the ops, for tensors of GPUs and of the CPU (Triton's interpreter), and for meta tensors."""
    library: Any = torch.library  # has no annotations
    owner = library.Library("smartmoe_triton", "DEF")
    fakes = {
        "multiply": lambda rows_NK, weight_SKM, ends_S: rows_NK.new_empty(rows_NK.shape[0], weight_SKM.shape[2]),
        "weight_gradient": _gradients_like,
        "add_weight_gradient": lambda total_SMK, grad_NM, rows_NK, ends_S: None,
    }
    for kernel in (multiply, weight_gradient, add_weight_gradient):
        name = kernel.__name__
        owner.define(name + SCHEMAS[name])
        for device in ("CUDA", "CPU"):
            owner.impl(name, kernel, device)
        owner.impl(name, fakes[name], "Meta")
    return owner


_OWNER = _register()  # the registrations live as long as their owner
