"""The ops on tensors without data, for torch.compile and meta devices: shapes and dtypes; nothing is checked."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops import packed


def digest_sum(bits_N: Tensor, positions_L: Tensor, width: int, value_factor: int) -> int:
    """A number that depends on the data: there is none without them."""
    raise NotImplementedError("smartmoe::digest_sum returns a number, which tensors without data have not")


def min_max_split(counts_RE: Tensor, hosts_ER: Tensor) -> Tensor:
    """Shape of smartmoe::min_max_split: tokens_ER int64 [E, R]."""
    return counts_RE.new_empty(hosts_ER.shape)


def exact_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int, trials: int) -> Tensor:
    """Shape of smartmoe::exact_replicas: slots_RS int64 [R, S]."""
    return slots_RS.new_empty(slots_RS.shape)


def exact_split(counts_RE: Tensor, spare_slots: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::exact_split: slots_RS and tokens_RS, int64 [R, S]."""
    shape = (counts_RE.shape[0], counts_RE.shape[1] // counts_RE.shape[0] + spare_slots)
    return counts_RE.new_empty(shape), counts_RE.new_empty(shape)


def history_replicas(
    slots_RS: Tensor,
    loads_KE: Tensor,
    home_slots: int,
    num_nodes: int,
    many: bool,
    max_steps: int,
    max_experts: int,
    max_slots: int,
    trials: int,
    good_enough: float,
    worst_weight: float,
    replica_price: float,
    change_price: float,
    min_gain: float,
    enough: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of smartmoe::history_replicas: slots_RS int64 [R, S], imbalance_K float64 [K], value_2 float64 [2]."""
    imbalance_K = slots_RS.new_empty((loads_KE.shape[0],), dtype=torch.float64)
    return slots_RS.new_empty(slots_RS.shape), imbalance_K, slots_RS.new_empty((2,), dtype=torch.float64)


def swap_homes(
    slots_RS: Tensor,
    loads_KE: Tensor,
    home_slots: int,
    num_nodes: int,
    max_steps: int,
    max_experts: int,
    max_slots: int,
    trials: int,
    worst_weight: float,
    replica_price: float,
    change_price: float,
    home_price: float,
    min_gain: float,
    enough: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of smartmoe::swap_homes: those of smartmoe::history_replicas."""
    imbalance_K = slots_RS.new_empty((loads_KE.shape[0],), dtype=torch.float64)
    return slots_RS.new_empty(slots_RS.shape), imbalance_K, slots_RS.new_empty((2,), dtype=torch.float64)


def paying_replicas(loads_KE: Tensor, slots_RS: Tensor, home_slots: int, price_23: Tensor, num_nodes: int) -> Tensor:
    """Shape of smartmoe::paying_replicas: slots_RS int64 [R, S]."""
    return slots_RS.new_empty(slots_RS.shape)


def exact_plan(
    load_E: Tensor,
    slots_RS: Tensor,
    home_slots: int,
    scope_nodes: int,
    or_group: bool,
    limit: float,
    price_23: Tensor,
    num_nodes: int,
) -> tuple[Tensor, int]:
    """Shape of smartmoe::exact_plan: slots_RS int64 [R, S], and a number that depends on the counts."""
    return slots_RS.new_empty(slots_RS.shape), scope_nodes


def relay_tree(slots_RS: Tensor, home_slots: int, num_nodes: int) -> Tensor:
    """Shape of smartmoe::relay_tree: int64 [3, R, K]."""
    return slots_RS.new_empty((3, slots_RS.shape[0], slots_RS.shape[1] - home_slots))


def relayed_flow(
    counts_RE: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int, kept_RS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of smartmoe::relayed_flow: traffic_RR float64, ranks_2R and numbers_5 int64."""
    num_ranks = counts_RE.shape[0]
    traffic_RR = counts_RE.new_empty((num_ranks, num_ranks), dtype=torch.float64)
    return traffic_RR, counts_RE.new_empty((2, num_ranks)), counts_RE.new_empty((5,))


def plan_dispatch(
    counts_RPE: Tensor,
    slots_RS: Tensor,
    home_slots: int,
    num_nodes: int,
    rank: int,
    tp_rank: int,
    used_slots: int | None,
    scope_nodes: int,
    or_group: bool,
    limit: float,
    price_23: Tensor,
    plan: Tensor,
) -> None:
    """smartmoe::plan_dispatch has no result: it writes to slots_RS and plan."""


def dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::dispatch_map: rows_TK int32 [T, K_top], tokens_S int64 [num_slots]."""
    return ids_TK.new_empty(ids_TK.shape, dtype=torch.int32), ids_TK.new_empty((num_slots,), dtype=torch.int64)


def permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Shape of smartmoe::permute: y_NH [num_rows, H]."""
    return x_TH.new_empty((num_rows, x_TH.shape[1]))


def permute_joined(x_TH: Tensor, more_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Shape of smartmoe::permute_joined: y_NH [num_rows, H]."""
    return x_TH.new_empty((num_rows, x_TH.shape[1]))


def permute_packed(
    x_TH: Tensor,
    weights_TK: Tensor,
    more_TH: Tensor | None,
    more_weights_TK: Tensor | None,
    rows_TK: Tensor,
    num_rows: int,
) -> Tensor:
    """Shape of smartmoe::permute_packed: packed_NP [num_rows, P]."""
    return x_TH.new_empty((num_rows, packed.width(x_TH.shape[1], x_TH.dtype, weights_TK.dtype)))


def unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Shape of smartmoe::unpermute: x_TH [T, H]."""
    return y_NH.new_empty((rows_TK.shape[0], y_NH.shape[1]))


def unpermute_backward(grad_TH: Tensor, y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::unpermute_backward: those of y_NH and weights_TK."""
    return y_NH.new_empty(y_NH.shape), weights_TK.new_empty(weights_TK.shape)


def swiglu(inner_NG: Tensor, probs_N: Tensor) -> Tensor:
    """Shape of smartmoe::swiglu: out_NF [N, F]."""
    return inner_NG.new_empty((inner_NG.shape[0], inner_NG.shape[1] // 2))


def swiglu_backward(grad_NF: Tensor, inner_NG: Tensor, probs_N: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::swiglu_backward: those of inner_NG and probs_N."""
    return inner_NG.new_empty(inner_NG.shape), probs_N.new_empty(probs_N.shape)


def zero_empty_groups(grad_SMK: Tensor, ends_S: Tensor) -> None:
    """smartmoe::zero_empty_groups has no result."""


def permute_weighted(x_TH: Tensor, weights_TK: Tensor, rows_TK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::permute_weighted: y_NH [num_rows, H], weights_N [num_rows]."""
    return x_TH.new_empty((num_rows, x_TH.shape[1])), weights_TK.new_empty((num_rows,))


def permute_weighted_backward(grad_NH: Tensor, grad_N: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::permute_weighted_backward: grad_TH [T, H], grad_TK [T, K_top]."""
    return grad_NH.new_empty((rows_TK.shape[0], grad_NH.shape[1])), grad_N.new_empty(rows_TK.shape)


def chosen_experts(routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::chosen_experts: ids_TK int32 and weights_TK, [T, top_k] each."""
    shape = (routing_map_TE.shape[0], top_k)
    return routing_map_TE.new_empty(shape, dtype=torch.int32), probs_TE.new_empty(shape)


def chosen_experts_backward(grad_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Shape of smartmoe::chosen_experts_backward: grad_TE [T, E]."""
    return grad_TK.new_empty((ids_TK.shape[0], num_experts))


def chunk_rows(counts_QS: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Shapes of smartmoe::chunk_rows: int32 [N] each."""
    to_slots_N = counts_QS.new_empty((num_rows,), dtype=torch.int32)
    return to_slots_N, torch.empty_like(to_slots_N)
