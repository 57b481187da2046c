"""The ops on tensors without data, for torch.compile and meta devices: checks, shapes and dtypes, nothing computed."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.checks import (
    check_dispatch_map,
    check_ids,
    check_num_experts,
    check_permute,
    check_replicas,
    check_split,
    check_unpermute,
    check_unpermute_backward,
)


def expert_histogram(ids: Tensor, num_experts: int) -> Tensor:
    """Shape of smartmoe::expert_histogram: counts_E int64 [num_experts]."""
    check_ids(ids)
    check_num_experts(num_experts)
    return ids.new_empty((num_experts,), dtype=torch.int64)


def min_max_split(counts_RE: Tensor, hosts_ER: Tensor) -> Tensor:
    """Shape of smartmoe::min_max_split: tokens_ER int64 [E, R]."""
    check_split(counts_RE, hosts_ER)
    num_ranks, num_experts = counts_RE.shape
    return counts_RE.new_empty((num_experts, num_ranks))


def exact_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int) -> Tensor:
    """Shape of smartmoe::exact_replicas: slots_RS int64 [R, S]."""
    check_replicas(load_E, slots_RS, home_slots, num_nodes)
    return slots_RS.new_empty(slots_RS.shape)


def dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::dispatch_map: rows_TK int32 [T, K_top], tokens_S int64 [num_slots]."""
    check_dispatch_map(ids_TK, slot_of_E, num_slots)
    return ids_TK.new_empty(ids_TK.shape, dtype=torch.int32), ids_TK.new_empty((num_slots,), dtype=torch.int64)


def permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Shape of smartmoe::permute: y_NH [num_rows, H]."""
    check_permute(x_TH, rows_TK, num_rows)
    return x_TH.new_empty((num_rows, x_TH.shape[1]))


def unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Shape of smartmoe::unpermute: x_TH [T, H]."""
    check_unpermute(y_NH, rows_TK, weights_TK)
    return y_NH.new_empty((rows_TK.shape[0], y_NH.shape[1]))


def unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::unpermute_backward: those of y_NH and weights_TK."""
    check_unpermute_backward(grad_TH, y_NH, rows_TK, weights_TK)
    return y_NH.new_empty(y_NH.shape), weights_TK.new_empty(weights_TK.shape)
