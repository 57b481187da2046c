"""The ops in plain torch: a twin for each kernel, with its name and arguments.

A twin defines what its op computes, is what the kernels are tested against, and serves the op where no compiled library
does. Twins run on any device without a host synchronisation; they are slower than the kernels and need more memory.

The twins of the host ops are numpy functions: megatron_smartmoe.placement.split.min_max_split,
megatron_smartmoe.placement.exact_replicas.exact_replicas and megatron_smartmoe.checkpoint.digest.digest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.checks import (
    check_dispatch_map,
    check_permute,
    check_unpermute,
    check_unpermute_backward,
)


def dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::dispatch_map: ids_TK -> rows_TK int32 [T, K_top], tokens_S int64 [num_slots]."""
    check_dispatch_map(ids_TK, slot_of_E, num_slots)
    num_experts, ids = slot_of_E.numel(), ids_TK.reshape(-1).long()
    known = (ids >= 0) & (ids < num_experts)
    slots = slot_of_E.long()[ids.clamp(0, num_experts - 1)]
    kept = known & (slots >= 0) & (slots < num_slots)
    slots = torch.where(kept, slots, num_slots)  # dropped choices sort behind all others
    rows = torch.empty_like(slots)
    rows[torch.argsort(slots, stable=True)] = torch.arange(slots.numel(), device=slots.device)
    rows_TK = torch.where(kept, rows, -1).int().reshape(ids_TK.shape)
    tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=ids.device)
    return rows_TK, tokens.scatter_add_(0, slots, torch.ones_like(slots))[:num_slots].clone()


def permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Twin of smartmoe::permute: x_TH, rows_TK -> y_NH with N = num_rows."""
    check_permute(x_TH, rows_TK, num_rows)
    kept = (rows_TK >= 0) & (rows_TK < num_rows)
    rows = torch.where(kept, rows_TK, num_rows).reshape(-1).long()  # dropped choices share one row, cut off below
    y_NH = x_TH.new_zeros((num_rows + 1, x_TH.shape[1]))
    y_NH[rows] = x_TH.repeat_interleave(rows_TK.shape[1], 0)
    return y_NH[:num_rows].clone()


def unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Twin of smartmoe::unpermute: y_NH, rows_TK, weights_TK -> x_TH, summed in the order of the choices."""
    check_unpermute(y_NH, rows_TK, weights_TK)
    sum_dtype = _sum_dtype(y_NH)
    x_TH = y_NH.new_zeros((rows_TK.shape[0], y_NH.shape[1]), dtype=sum_dtype)
    for j in range(rows_TK.shape[1]):
        chosen_TH = _gather(y_NH, rows_TK[:, j]).to(sum_dtype)
        x_TH += chosen_TH if weights_TK is None else _scaled(chosen_TH, rows_TK[:, j], weights_TK[:, j], y_NH)
    return x_TH.to(y_NH.dtype)


def unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::unpermute_backward: gradients of y_NH and of weights_TK."""
    check_unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK)
    num_rows, num_choices = y_NH.shape[0], rows_TK.shape[1]
    sum_dtype = _sum_dtype(y_NH)
    grad = grad_TH.to(sum_dtype)
    grad_y = y_NH.new_zeros((num_rows + 1, y_NH.shape[1]))
    grad_weights = weights_TK.new_zeros(weights_TK.shape)
    for j in range(num_choices):
        rows_T = rows_TK[:, j]
        rows = torch.where((rows_T >= 0) & (rows_T < num_rows), rows_T, num_rows).long()
        grad_y[rows] = (grad * weights_TK[:, j, None].to(sum_dtype)).to(y_NH.dtype)
        grad_weights[:, j] = (grad * _gather(y_NH, rows_T).to(sum_dtype)).sum(1).to(weights_TK.dtype)
    return grad_y[:num_rows].clone(), grad_weights


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _gather(y_NH: Tensor, rows_T: Tensor) -> Tensor:
    """Row rows_T[t] of y_NH for each t, zeros where there is none."""
    num_rows = y_NH.shape[0]
    if num_rows == 0:
        return y_NH.new_zeros((rows_T.numel(), y_NH.shape[1]))
    kept = (rows_T >= 0) & (rows_T < num_rows)
    return torch.where(kept[:, None], y_NH[rows_T.clamp(0, num_rows - 1).long()], 0)


def _scaled(chosen_TH: Tensor, rows_T: Tensor, weights_T: Tensor, y_NH: Tensor) -> Tensor:
    """chosen_TH times its weights, zeros where there is no row, whatever the weight is."""
    kept = (rows_T >= 0) & (rows_T < y_NH.shape[0])
    return torch.where(kept[:, None], weights_T[:, None].to(chosen_TH.dtype) * chosen_TH, 0)
