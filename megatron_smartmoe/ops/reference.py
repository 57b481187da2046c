"""The ops in plain torch: a twin for each kernel, with its name and arguments.

A twin defines what its op computes, is what the kernels are tested against, and serves the op where no compiled library
does. Twins run on any device without a host synchronisation; they are slower than the kernels and need more memory.

The twins of the host ops are numpy functions: megatron_smartmoe.placement.split.min_max_split,
megatron_smartmoe.placement.exact_replicas.exact_replicas and megatron_smartmoe.checkpoint.digest.digest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops import packed
from megatron_smartmoe.ops.checks import (
    check_chosen_experts,
    check_chosen_experts_backward,
    check_chunk_rows,
    check_dispatch_map,
    check_empty_groups,
    check_permute,
    check_permute_joined,
    check_permute_packed,
    check_permute_weighted,
    check_permute_weighted_backward,
    check_swiglu,
    check_swiglu_backward,
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


def permute_joined(x_TH: Tensor, more_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Twin of smartmoe::permute_joined: permute on the tokens of both blocks."""
    check_permute_joined(x_TH, more_TH, rows_TK, num_rows)
    return permute(torch.cat((x_TH, more_TH)), rows_TK, num_rows)


def permute_packed(
    x_TH: Tensor,
    weights_TK: Tensor,
    more_TH: Tensor | None,
    more_weights_TK: Tensor | None,
    rows_TK: Tensor,
    num_rows: int,
) -> Tensor:
    """Twin of smartmoe::permute_packed: permute_weighted on the tokens of both blocks, packed."""
    check_permute_packed(x_TH, weights_TK, more_TH, more_weights_TK, rows_TK, num_rows)
    if more_TH is not None and more_weights_TK is not None:
        x_TH, weights_TK = torch.cat((x_TH, more_TH)), torch.cat((weights_TK, more_weights_TK))
    return packed.whole(*permute_weighted(x_TH, weights_TK, rows_TK, num_rows))


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


def swiglu(inner_NG: Tensor, probs_N: Tensor) -> Tensor:
    """Twin of smartmoe::swiglu: inner_NG, probs_N -> out_NF, rounded once."""
    check_swiglu(inner_NG, probs_N)
    gate, linear = inner_NG.to(_sum_dtype(inner_NG)).chunk(2, dim=1)
    return (gate * torch.sigmoid(gate) * linear * probs_N[:, None].to(gate.dtype)).to(inner_NG.dtype)


def swiglu_backward(grad_NF: Tensor, inner_NG: Tensor, probs_N: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::swiglu_backward: gradients of inner_NG and of probs_N."""
    check_swiglu_backward(grad_NF, inner_NG, probs_N)
    sum_dtype = _sum_dtype(inner_NG)
    gate, linear = inner_NG.to(sum_dtype).chunk(2, dim=1)
    grad, sigmoid = grad_NF.to(sum_dtype), torch.sigmoid(gate)
    scaled, silu = grad * probs_N[:, None].to(sum_dtype), gate * sigmoid
    to_gate = scaled * linear * (sigmoid * (1 + gate * (1 - sigmoid)))
    grad_inner = torch.cat((to_gate, scaled * silu), dim=1).to(inner_NG.dtype)
    return grad_inner, (grad * (silu * linear)).sum(1).to(probs_N.dtype)


def zero_empty_groups(grad_SMK: Tensor, ends_S: Tensor) -> None:
    """Twin of smartmoe::zero_empty_groups: clears the groups of grad_SMK that have no rows."""
    check_empty_groups(grad_SMK, ends_S)
    is_empty_S = torch.diff(ends_S, prepend=ends_S.new_zeros(1)) == 0
    grad_SMK.masked_fill_(is_empty_S[:, None, None], 0)


def permute_weighted(x_TH: Tensor, weights_TK: Tensor, rows_TK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::permute_weighted: permute, and the weights in the order of the rows."""
    check_permute_weighted(x_TH, weights_TK, rows_TK, num_rows)
    rows = rows_TK.reshape(-1).long()
    rows = torch.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    weights_N = weights_TK.new_zeros(num_rows + 1).scatter(0, rows, weights_TK.reshape(-1))
    return permute(x_TH, rows_TK, num_rows), weights_N[:num_rows].clone()


def permute_weighted_backward(grad_NH: Tensor, grad_N: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::permute_weighted_backward: gradients of x_TH and of weights_TK."""
    check_permute_weighted_backward(grad_NH, grad_N, rows_TK)
    grad_TK = torch.stack([_gather(grad_N[:, None], rows_T)[:, 0] for rows_T in rows_TK.unbind(1)] or [grad_N], dim=1)
    return unpermute(grad_NH, rows_TK, None), grad_TK.reshape(rows_TK.shape)


def chosen_experts(routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::chosen_experts: the first top_k experts of each token, and their probabilities."""
    check_chosen_experts(routing_map_TE, probs_TE, top_k)
    num_experts = routing_map_TE.shape[1]
    place_TE = routing_map_TE.int().cumsum(1)  # the number of a chosen expert among its token's, from 1
    kept_TE = routing_map_TE & (place_TE <= top_k)
    place_TE = torch.where(kept_TE, place_TE - 1, top_k).long()  # all others share a column that is cut off
    ids_TK = torch.full((len(place_TE), top_k + 1), num_experts, dtype=torch.int32, device=probs_TE.device)
    experts_TE = torch.arange(num_experts, dtype=torch.int32, device=probs_TE.device).expand(place_TE.shape)
    weights_TK = probs_TE.new_zeros(ids_TK.shape)
    return (
        ids_TK.scatter(1, place_TE, experts_TE)[:, :top_k].clone(),
        weights_TK.scatter(1, place_TE, probs_TE)[:, :top_k].clone(),
    )


def chosen_experts_backward(grad_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Twin of smartmoe::chosen_experts_backward: the gradient of probs_TE."""
    check_chosen_experts_backward(grad_TK, ids_TK, num_experts)
    ids = torch.where((ids_TK >= 0) & (ids_TK < num_experts), ids_TK, num_experts).long()
    return grad_TK.new_zeros((len(ids), num_experts + 1)).scatter(1, ids, grad_TK)[:, :num_experts].clone()


def chunk_rows(counts_QS: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Twin of smartmoe::chunk_rows: where the rows go, and the way back, int32 [N] each."""
    check_chunk_rows(counts_QS, num_rows)
    num_sources, num_slots = counts_QS.shape
    slots = torch.arange(num_slots, device=counts_QS.device).repeat(num_sources)
    slot_N = slots.repeat_interleave(counts_QS.reshape(-1), output_size=num_rows)
    to_sources_N = torch.argsort(slot_N, stable=True)
    to_slots_N = torch.empty_like(to_sources_N)
    to_slots_N[to_sources_N] = torch.arange(num_rows, device=counts_QS.device)
    return to_slots_N.int(), to_sources_N.int()


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
