"""Which replica computes which token: the split of one micro-batch, computed on every rank alike.

All ranks of an expert-parallel group hold the counts of all of them (the dropless dispatch gathers them anyway), so
they compute the same split without further messages. A rank keeps its tokens sorted by expert; an expert's run is
divided into consecutive segments, one for its home and each replica in the order of the ranks, and a segment moves as a
whole to its place in the send order. So the row of a choice is its row in the order of the experts plus the shift of
its segment: two small vectors go to the device.

Experts are numbered by their home here: expert e is at home on rank e // S in home slot e % S.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement import split
from megatron_smartmoe.placement.exact_plan import ExactPlan, ExactPlanOptions
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of, with_empty_slots

BALANCED = 1.01  # max / mean tokens per rank up to which a micro-batch gets no replicas: they could win 1% at most


class Replica(NamedTuple):
    """One replica: `slot` counts the spare slots of `rank`, `home_slot` the home slots of `home_rank`.

    A named tuple, because a layer makes them anew for every micro-batch: a dataclass takes several times as long.
    """

    expert: int
    home_rank: int
    home_slot: int
    rank: int
    slot: int


def homes_only(num_experts: int, num_ranks: int, spare_slots: int) -> IntArray:
    """The slots `[R, S + K]` without any replica."""
    homes_RS = np.arange(num_experts, dtype=np.int64).reshape(num_ranks, -1)
    return with_empty_slots(homes_RS, spare_slots)


def replicas_of(slots_RS: IntArray, home_slots: int, rank: int | None = None) -> tuple[Replica, ...]:
    """The replicas of a slot table, by rank, then slot: the order in which every rank sends and sums them.

    Args:
        slots_RS: The slot table.
        home_slots: S, the home slots of a rank.
        rank: Leaves out the replicas that this rank neither holds nor has the home of; None keeps all.
    """
    rank_N, slot_N = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
    expert_N = slots_RS[rank_N, home_slots + slot_N]
    if rank is not None:
        own_N = (rank_N == rank) | (expert_N // home_slots == rank)
        rank_N, slot_N, expert_N = rank_N[own_N], slot_N[own_N], expert_N[own_N]
    home_rank_N, home_slot_N = np.divmod(expert_N, home_slots)
    columns = (expert_N, home_rank_N, home_slot_N, rank_N, slot_N)  # in the order of the fields
    return tuple(map(Replica, *(column.tolist() for column in columns)))


def compiled_drop_losing(loads_KE: IntArray, slots_RS: IntArray, home_slots: int, price: TransferPrice) -> IntArray:
    """`without_losing_replicas` by the compiled op."""
    loads, slots = torch.from_numpy(loads_KE), torch.from_numpy(slots_RS)
    found = ops.paying_replicas(loads, slots, home_slots, price_tensor(price), price.num_nodes)
    return np.asarray(found.numpy())


@functools.lru_cache(maxsize=64)
def price_tensor(price: TransferPrice) -> torch.Tensor:
    """Of both ways what the compiled functions take, float64 `[2, 3]`; see `TransferPrice.legs`."""
    return torch.tensor(price.legs, dtype=torch.float64)


def compiled_exact_plan(load_E: IntArray, slots_RS: IntArray, home_slots: int, options: ExactPlanOptions) -> ExactPlan:
    """`cheapest_exact_plan` by the compiled op."""
    new_RS, num_nodes = ops.exact_plan(
        torch.from_numpy(load_E),
        torch.from_numpy(np.array(slots_RS)),
        home_slots,
        scope_nodes=options.num_nodes,
        or_group=options.or_group,
        limit=options.limit,
        price_23=price_tensor(options.price),
        num_nodes=options.price.num_nodes,
    )
    return ExactPlan(slots_RS=np.asarray(new_RS.numpy()), num_nodes=num_nodes)


def compiled_replicas(load_E: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int) -> IntArray:
    """`exact_replicas` by the compiled op: the same integers, about 20 times as fast as numpy."""
    slots = torch.from_numpy(np.array(slots_RS))  # a placement's own slots are not writable, of which torch warns
    planned = ops.exact_replicas(torch.from_numpy(load_E), slots, home_slots, num_nodes)
    return np.asarray(planned.numpy())


def split_tokens(counts_RE: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int = 1) -> IntArray:
    """Split the tokens over homes and replicas so that the busiest rank gets as few as any split can give it.

    Args:
        counts_RE: Tokens of source rank r for expert e.
        slots_RS: Expert in each slot, homes first, EMPTY for none.
        home_slots: S, the home slots of a rank.
        num_nodes: Nodes that the ranks lie on; a replica on a token's own node is preferred.

    Returns:
        The tokens that each source rank sends to each slot, `[source rank, rank, slot]`.
    """
    # Without replicas every token goes to its expert's home.
    if (slots_RS[:, home_slots:] == EMPTY).all():
        sent_RRS = np.zeros((len(counts_RE), *slots_RS.shape), dtype=np.int64)
        sent_RRS[:, :, :home_slots] = counts_RE[:, slots_RS[:, :home_slots]]
        return sent_RRS
    # Step 1: tokens of each expert on each of its ranks. Step 2: the source ranks that they come from.
    hosts_ER = hosts_of(slots_RS, counts_RE.shape[1])
    if ops.is_compiled():
        tokens_ER = ops.min_max_split(torch.from_numpy(counts_RE), torch.from_numpy(hosts_ER)).numpy()
    else:
        tokens_ER = split.min_max_split(counts_RE, hosts_ER)
    return split.assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)


def segment_shifts(sent_RS: IntArray, slots_RS: IntArray) -> tuple[IntArray, IntArray]:
    """How one source rank's rows move from the order of the experts to the send order, which is by rank, then slot.

    Args:
        sent_RS: Tokens of this source rank for each slot.
        slots_RS: Expert in each slot, EMPTY for none.

    Returns:
        The lengths of the segments `[P]`, ordered by expert, then rank; and by how many rows each moves, `[P]`.
    """
    # Step 1: a segment for each used slot.
    rank_P, slot_P = _segment_slots(slots_RS)
    length_P = sent_RS[rank_P, slot_P]
    # Step 2: its start in the send order minus its start in the order of the experts.
    begin_RS = (np.cumsum(sent_RS) - sent_RS.ravel()).reshape(sent_RS.shape)
    return length_P, begin_RS[rank_P, slot_P] - (np.cumsum(length_P) - length_P)


def _segment_slots(slots_RS: IntArray) -> tuple[IntArray, IntArray]:
    """Rank and slot of each segment: the used slots ordered by expert, then rank."""
    rank_P, slot_P = np.nonzero(slots_RS != EMPTY)
    order_P = np.lexsort((rank_P, slots_RS[rank_P, slot_P]))
    return rank_P[order_P], slot_P[order_P]


def slot_of_rows(rows_TK: torch.Tensor, segments_2P: torch.Tensor, slots_RS: IntArray, num_rows: int) -> torch.Tensor:
    """The physical slot of every choice, int64 `[T, K_top]`: rank x slots of a rank + slot. The host does not wait.

    Args:
        rows_TK: rows in the order of the experts; -1 for a dropped choice, whose slot is the number of all slots.
        segments_2P: the segments' lengths and shifts, see `segment_shifts`; any number of empty ones behind them.
        slots_RS: expert in each slot, EMPTY for none.
        num_rows: the sum of the lengths.
    """
    rank_P, slot_P = _segment_slots(slots_RS)
    slot_of_segment_P = torch.from_numpy(rank_P * slots_RS.shape[1] + slot_P).to(rows_TK.device, non_blocking=True)
    length_P = segments_2P[0, : len(rank_P)].to(rows_TK.device, non_blocking=True)
    slot_N = torch.repeat_interleave(slot_of_segment_P, length_P, output_size=num_rows)
    slot_N = torch.cat((slot_N, slot_N.new_full((1,), slots_RS.size)))  # which -1 refers to
    return slot_N[rows_TK.long()]


def slot_of_device_rows(rows_TK: torch.Tensor, segments_3C: torch.Tensor, num_slots: int) -> torch.Tensor:
    """`slot_of_rows` from a plan that the host has not read; no shape depends on it.

    Args:
        rows_TK: see `slot_of_rows`.
        segments_3C: the segments' lengths, shifts and slots.
        num_slots: all slots of the group.
    """
    none = segments_3C.new_full((1,), num_slots)
    dropped = rows_TK.numel() - segments_3C[0].sum(0, keepdim=True)  # rows that no choice has, behind all others
    slot_of_segment = torch.cat((segments_3C[2], none))
    lengths = torch.cat((segments_3C[0], dropped))
    slot_N = torch.repeat_interleave(slot_of_segment, lengths, output_size=rows_TK.numel())
    return torch.cat((slot_N, none))[rows_TK.long()]  # -1 refers to the last


def shifted_rows(rows_TK: torch.Tensor, segments_2P: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows `[T, K_top]` after the segments have moved; -1 stays -1. The host does not wait for the device.

    Args:
        rows_TK: Rows in the order of the experts.
        segments_2P: The segments' lengths and shifts, see `segment_shifts`.
        num_rows: The sum of the lengths.
    """
    if num_rows == 0:
        return rows_TK
    segments_2P = segments_2P.to(rows_TK.device, non_blocking=True)
    shift_N = torch.repeat_interleave(segments_2P[1], segments_2P[0], output_size=num_rows).to(rows_TK.dtype)
    return torch.where(rows_TK < 0, rows_TK, rows_TK + shift_N[rows_TK.clamp(min=0).long()])
