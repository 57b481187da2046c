"""A bias per group of rows, without atomic additions and without a wait of the host.

The gradient of a group's bias is the sum of its rows. On a GPU that is a product of ones with the rows, by the grouped
GEMM that the weights' gradients come from: it reads the groups on the device, and adds in one order every time. On the
CPU each group is summed as torch sums the gradient of a bias, to the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_smartmoe.ops.grouped_linear import Groups, weight_gradient

_COLUMNS = 8  # of the ones: a row of 16 bytes in bf16, the least that torch's grouped GEMM takes


def bias_of_rows(bias_S1M: Tensor, groups: Groups, num_rows: int, factors_N: Tensor | None = None) -> Tensor:
    """The bias of each row's group, `[N, M]`.

    Args:
        bias_S1M: a bias per group.
        groups: where each group's rows are; they cover all rows.
        num_rows: N.
        factors_N: what each row's bias is multiplied by; None for 1. Nothing of the size of the rows is kept for the
            backward pass.
    """
    bias_NM: Tensor = _BiasOfRows.apply(bias_S1M, groups, num_rows, factors_N)  # type: ignore[no-untyped-call]
    return bias_NM


class _BiasOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias_S1M: Tensor, groups: Groups, num_rows: int, factors_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(bias_S1M, factors_N)
        ctx.groups = groups
        bias_NM = _spread(bias_S1M, groups, num_rows)
        return bias_NM if factors_N is None else bias_NM * factors_N.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        bias_S1M, factors_N = ctx.saved_tensors
        grad_factors_N, grad_bias_NM = None, grad_NM
        if factors_N is not None:
            grad_bias_NM = grad_NM * factors_N.unsqueeze(1)
            if ctx.needs_input_grad[3]:
                bias_NM = _spread(bias_S1M, ctx.groups, len(grad_NM))
                grad_factors_N = (grad_NM * bias_NM).sum(dim=1).to(factors_N.dtype)
        return _sums(grad_bias_NM.to(bias_S1M.dtype), bias_S1M, ctx.groups), None, None, grad_factors_N


def _spread(bias_S1M: Tensor, groups: Groups, num_rows: int) -> Tensor:
    """The bias of each row's group."""
    bias_SM = bias_S1M.squeeze(1)
    if groups.ends_S is not None:
        rows_N = torch.arange(num_rows, dtype=groups.ends_S.dtype, device=groups.ends_S.device)
        return bias_SM.index_select(0, torch.searchsorted(groups.ends_S, rows_N, right=True))
    out_NM = bias_SM.new_empty(num_rows, bias_SM.shape[1])
    for group, begin, end in groups.bounds:
        out_NM[begin:end] = bias_SM[group]
    return out_NM


def _sums(grad_NM: Tensor, bias_S1M: Tensor, groups: Groups) -> Tensor:
    """The sum of each group's rows, shaped as the biases."""
    if groups.ends_S is not None:
        ones = grad_NM.new_ones(len(grad_NM), _COLUMNS)
        columns = bias_S1M.new_empty(bias_S1M.shape[0], bias_S1M.shape[2], _COLUMNS)
        sums_SM1 = weight_gradient(grad_NM.contiguous(), ones, columns, groups)[:, :, :1]
        return sums_SM1.transpose(1, 2).contiguous()
    sums_S1M = torch.zeros_like(bias_S1M)
    for group, begin, end in groups.bounds:
        torch.sum(grad_NM[begin:end], dim=0, keepdim=True, out=sums_S1M[group])
    return sums_S1M
