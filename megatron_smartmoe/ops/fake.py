"""The ops on tensors without data, for torch.compile and meta devices: shapes and dtypes; nothing is checked."""

from __future__ import annotations

import torch
from torch import Tensor


def digest_sum(bits_N: Tensor, positions_L: Tensor, width: int, value_factor: int) -> int:
    """A number that depends on the data: there is none without them."""
    raise NotImplementedError("smartmoe::digest_sum returns a number, which tensors without data have not")


def min_max_split(counts_RE: Tensor, hosts_ER: Tensor) -> Tensor:
    """Shape of smartmoe::min_max_split: tokens_ER int64 [E, R]."""
    return counts_RE.new_empty(hosts_ER.shape)


def exact_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int) -> Tensor:
    """Shape of smartmoe::exact_replicas: slots_RS int64 [R, S]."""
    return slots_RS.new_empty(slots_RS.shape)


def dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::dispatch_map: rows_TK int32 [T, K_top], tokens_S int64 [num_slots]."""
    return ids_TK.new_empty(ids_TK.shape, dtype=torch.int32), ids_TK.new_empty((num_slots,), dtype=torch.int64)


def permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Shape of smartmoe::permute: y_NH [num_rows, H]."""
    return x_TH.new_empty((num_rows, x_TH.shape[1]))


def unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Shape of smartmoe::unpermute: x_TH [T, H]."""
    return y_NH.new_empty((rows_TK.shape[0], y_NH.shape[1]))


def unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::unpermute_backward: those of y_NH and weights_TK."""
    return y_NH.new_empty(y_NH.shape), weights_TK.new_empty(weights_TK.shape)
