"""The compiled twins of `placement`'s functions, as numpy functions."""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.cost.moe_layer import RelayedFlow
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.relay import RelayTree
from megatron_smartmoe.runtime.replicas.history_plan import compiled_best_replicas, compiled_improve
from megatron_smartmoe.runtime.replicas.split import (
    compiled_drop_losing,
    compiled_exact_plan,
    compiled_replicas,
)
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import BoolArray


def fastest_kernels() -> Kernels:
    """The compiled functions, or numpy's where the library is not built. Both find the same."""
    return COMPILED if ops.is_compiled() else NUMPY


def exact_slots(
    counts_RE: IntArray,
    slots_RS: IntArray,
    home_slots: int,
    *,
    num_nodes: int,
    limit: float,
    price: TransferPrice,
    or_group: bool = False,
) -> IntArray:
    """Slots with replicas planned for exactly these tokens, or without any where replicas would not pay.

    Args:
        counts_RE: Tokens of source rank r for expert e.
        slots_RS: The slot table; only its home slots are read.
        home_slots: S, the home slots of a rank.
        num_nodes: Nodes of the group; a replica stays on its home's node. 1 lets it go anywhere.
        limit: No replica is made while max / mean tokens per rank of the homes alone are at most this.
        price: See `placement.paying_replicas.without_losing_replicas`.
        or_group: Whether it may go anywhere where that is cheaper; see `placement.exact_plan`.

    Returns:
        The slot table `[R, S + K]`.
    """
    options = ExactPlanOptions(num_nodes=num_nodes, or_group=or_group, price=price, limit=limit)
    return fastest_kernels().exact_plan(counts_RE.sum(axis=0), slots_RS, home_slots, options).slots_RS


def _split(counts_RE: IntArray, hosts_ER: BoolArray) -> IntArray:
    counts = torch.from_numpy(np.ascontiguousarray(counts_RE, dtype=np.int64))
    return np.asarray(ops.min_max_split(counts, torch.from_numpy(np.array(hosts_ER))).numpy())


def _busiest(hosts_ER: BoolArray, load_E: IntArray) -> int:
    counts_RE = np.zeros((hosts_ER.shape[1], len(load_E)), dtype=np.int64)
    counts_RE[0] = load_E  # where the tokens come from changes which ranks take them, not the largest load
    return int(_split(counts_RE, hosts_ER).sum(axis=0).max())


def _relay(slots_RS: IntArray, home_slots: int, num_nodes: int) -> RelayTree:
    tree_3RK = ops.relay_tree(torch.from_numpy(np.array(slots_RS)), home_slots, num_nodes).numpy()
    parent_RK, parent_slot_RK, round_RK = np.asarray(tree_3RK)
    return RelayTree(parent_RK=parent_RK, parent_slot_RK=parent_slot_RK, round_RK=round_RK, home_slots=home_slots)


def _flow(
    counts_RE: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int, kept_RS: IntArray | None
) -> RelayedFlow:
    counts = torch.from_numpy(np.ascontiguousarray(counts_RE, dtype=np.int64))
    kept = None if kept_RS is None else torch.from_numpy(np.array(kept_RS))
    traffic_RR, ranks_2R, numbers_5 = ops.relayed_flow(
        counts, torch.from_numpy(np.array(slots_RS)), home_slots, num_nodes, kept
    )
    tokens_R, active_R = np.asarray(ranks_2R.numpy())
    early, inside, between, kept_inside, kept_between = numbers_5.tolist()
    return RelayedFlow(
        tokens_R=tokens_R.astype(np.float64),
        active_R=active_R,
        traffic_RR=np.asarray(traffic_RR.numpy()),
        num_nodes=num_nodes,
        replica_steps=(inside, between),
        early_tokens=float(early),
        kept_steps=(kept_inside, kept_between),
    )


COMPILED = Kernels(
    best=compiled_best_replicas,
    improve=compiled_improve,
    drop=compiled_drop_losing,
    exact=compiled_replicas,
    exact_plan=compiled_exact_plan,
    split=_split,
    busiest=_busiest,
    relay=_relay,
    flow=_flow,
)
