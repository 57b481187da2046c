"""Kernels as torch ops: torch.ops.smartmoe.* from the compiled library, or from torch where it is not built.

T tokens, K_top top-k, E experts, R ranks, S slots of a rank, N rows sorted by slot, H hidden size. Every op has a twin
that defines what it computes, and a fake kernel for torch.compile. The twin of a kernel is in reference.py; the twins
of the host ops are numpy functions: min_max_split and exact_replicas of megatron_smartmoe.placement,
megatron_smartmoe.checkpoint.digest.digest, and, for plan_dispatch,
megatron_smartmoe.runtime.replicas.dispatch_plan.plan_in_steps.
`backend()` returns what serves the ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_smartmoe.ops.library import SlowOpsWarning, backend, is_compiled

__all__ = [
    "SlowOpsWarning",
    "backend",
    "chosen_experts",
    "chunk_rows",
    "digest_sum",
    "dispatch_map",
    "exact_plan",
    "exact_replicas",
    "exact_split",
    "history_replicas",
    "is_compiled",
    "min_max_split",
    "paying_replicas",
    "permute",
    "permute_joined",
    "permute_packed",
    "permute_weighted",
    "plan_dispatch",
    "relay_tree",
    "relayed_flow",
    "sum_of_rows",
    "swap_homes",
    "swiglu",
    "unpermute",
]


def digest_sum(bits_N: Tensor, positions_L: Tensor, width: int, value_factor: int) -> int:
    """The sum that rows of elements add to their tensor's digest, see megatron_smartmoe.checkpoint.digest.

    It runs on the host in one thread without the interpreter's lock, and only from the compiled library.

    Args:
        bits_N: the elements of all rows, one row after another, as integers of their size: uint8, int16, int32 or int64
            `[L * width]` on the CPU, contiguous. An int stands for the unsigned number with its bits.
        positions_L: position in the logical tensor of the first element of each row, int64 `[L]` on the CPU.
        width: elements of a row, at least 1.
        value_factor: what the bits of an element are multiplied with, the int64 with the bits of `value_factor(dtype)`.

    Returns:
        The sum modulo 2^64, as the int64 with its bits.

    Raises:
        RuntimeError: a dtype or shape is wrong, a tensor is on a GPU, or the library is not built.
    """
    total: int = torch.ops.smartmoe.digest_sum(bits_N, positions_L, width, value_factor)
    return total


def sum_of_rows(bits: NDArray[Any], positions: NDArray[np.int64], width: int, value_factor: int) -> int:
    """`digest_sum` for numpy's unsigned integers: a `checkpoint.digest.SumOfRows`, only from the compiled library."""
    signed = value_factor - 2**64 if value_factor >= 2**63 else value_factor
    kind = "uint8" if bits.itemsize == 1 else f"int{8 * bits.itemsize}"
    return digest_sum(torch.from_numpy(bits.view(kind)), torch.from_numpy(positions), width, signed)


def min_max_split(counts_RE: Tensor, hosts_ER: Tensor) -> Tensor:
    """Splits each expert's tokens over its home and replicas with the smallest possible largest rank load.

    Returns the same integers as its numpy twin, megatron_smartmoe.placement.split.min_max_split, which explains the
    method. It runs on the host in one thread, and only from the compiled library.

    Args:
        counts_RE: tokens of source rank r for expert e, int64 [R, E] on the CPU, R at least 1; their sum is below 2^63.
        hosts_ER: whether rank r holds expert e, as its home or a replica, bool [E, R] on the CPU.

    Returns:
        tokens_ER: tokens of expert e that rank r takes, int64 [E, R].

    Raises:
        RuntimeError: a dtype or shape is wrong, a count is negative, the counts add up to 2^63 or more, no rank holds
            an expert that has tokens, a tensor is on a GPU, or the library is not built.
    """
    tokens_ER: Tensor = torch.ops.smartmoe.min_max_split(counts_RE, hosts_ER)
    return tokens_ER


TRIALS = 16  # of exact_replicas: placement/exact_search.py has the same


def exact_replicas(
    load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int = 1, trials: int = TRIALS
) -> Tensor:
    """Plans the replicas of one micro-batch from the exact load of each expert.

    Returns the same slots as its numpy twin, megatron_smartmoe.placement.exact_replicas.exact_replicas, which explains
    the method. It runs on the host in one thread, and only from the compiled library.

    Args:
        load_E: tokens of each expert, int64 [E] on the CPU; their sum is below 2^63.
        slots_RS: expert in each slot, int64 [R, S] on the CPU, R at least 1. Each expert has one home; the contents of
            the spare slots are ignored.
        home_slots: columns of slots_RS that are homes, E / R.
        num_nodes: nodes that the ranks lie on, R / num_nodes consecutive ranks each; a replica stays on the node of its
            home.
        trials: of the local search that follows the greedy pass; 0 for none.

    Returns:
        slots_RS: the same homes and new replicas, -1 for an empty slot, int64 [R, S].

    Raises:
        RuntimeError: a dtype, shape or number is wrong, a load is negative, the loads add up to 2^63 or more, an expert
            has no home or two, a tensor is on a GPU, or the library is not built.
    """
    new_RS: Tensor = torch.ops.smartmoe.exact_replicas(load_E, slots_RS, home_slots, num_nodes, trials)
    return new_RS


def exact_split(counts_RE: Tensor, spare_slots: int, num_nodes: int = 1) -> tuple[Tensor, Tensor]:
    """Plans the replicas of one micro-batch from its counts and splits its tokens over them, where the counts are.

    Equal to `exact_replicas` with trials=0 and `min_max_split`, to the last token, on the host and on a GPU, where one
    block does both in its shared memory and the host waits for nothing. The search of `exact_replicas` is the host's
    alone. Only from the compiled library.

    Args:
        counts_RE: tokens of source rank r for expert e, int64 [R, E], E a multiple of R; experts are numbered by their
            homes. On a GPU the values are not checked: none is negative, and their sum is below 2^63.
        spare_slots: of each rank. On a GPU the plan must fit in 48 KiB: 512 experts on 64 ranks with 4 of them do.
        num_nodes: nodes that the ranks lie on; a replica stays on the node of its home.

    Returns:
        slots_RS: homes and replicas, -1 for an empty slot, int64 [R, S].
        tokens_RS: tokens that each slot takes, int64 [R, S].

    Raises:
        RuntimeError: a dtype, shape or number is wrong, or on the host a count is negative or the counts add up to 2^63
            or more, or the library is not built.
    """
    slots_RS, tokens_RS = torch.ops.smartmoe.exact_split(counts_RE, spare_slots, num_nodes)
    return slots_RS, tokens_RS


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
    """Plans the replicas of one layer from history.

    Returns the same as its numpy twin, megatron_smartmoe.placement.plan_replicas.best_replicas, which explains the
    method. It runs on the host in one thread without the interpreter's lock, and only from the compiled library.

    Args:
        slots_RS: the slots as they are, int64 [R, S] on the CPU, -1 for an empty one.
        loads_KE: scenarios as `scaled` gives them, the likeliest first, int64 [K, E] on the CPU.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on; a replica stays on the node of its home.
        many: whether a step is slow: then both plans are only judged before the better one is improved.
        max_steps: of the search; see `search.objective.Space`, for the next three too.
        max_experts: see there.
        max_slots: see there.
        trials: see there.
        good_enough: see `ReplicaOptions`.
        worst_weight: see `search.objective.Objective`, for the next four too.
        replica_price: see there.
        change_price: see there.
        min_gain: see there.
        enough: see there.

    Returns:
        slots_RS: the same homes and the replicas found, int64 [R, S].
        imbalance_K: max / mean tokens per rank in each scenario, float64 [K].
        value_2: the excess, and the changes made by the last search, float64 [2].

    Raises:
        RuntimeError: a dtype, shape or number is wrong, an expert has no home or two, a load is negative, the loads of
            a row add up to more than 2^53, a tensor is on a GPU, or the library is not built.
    """
    new_RS, imbalance_K, value_2 = torch.ops.smartmoe.history_replicas(
        slots_RS,
        loads_KE,
        home_slots,
        num_nodes,
        many,
        max_steps,
        max_experts,
        max_slots,
        trials,
        good_enough,
        worst_weight,
        replica_price,
        change_price,
        min_gain,
        enough,
    )
    return new_RS, imbalance_K, value_2


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
    """Searches one layer for better replicas and better homes, which stay on their node.

    Returns the same as its numpy twin, megatron_smartmoe.placement.search.improve.improve with homes that may move,
    which explains the method. It runs on the host in one thread without the interpreter's lock, and only from the
    compiled library.

    Args:
        slots_RS: the slots as they are, int64 [R, S] on the CPU, -1 for an empty one.
        loads_KE: scenarios as `scaled` gives them, int64 [K, E] on the CPU.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on; homes and their replicas stay on one.
        max_steps: of the search; see `search.objective.Space`, for the next three too.
        max_experts: see there.
        max_slots: see there.
        trials: see there.
        worst_weight: see `search.objective.Objective`, for the next five too.
        replica_price: see there.
        change_price: see there.
        home_price: see there.
        min_gain: see there.
        enough: see there.

    Returns:
        slots_RS: the homes and replicas found, int64 [R, S].
        imbalance_K: max / mean tokens per rank in each scenario, float64 [K].
        value_2: the excess, and the number of changes, float64 [2].

    Raises:
        RuntimeError: see `history_replicas`.
    """
    new_RS, imbalance_K, value_2 = torch.ops.smartmoe.swap_homes(
        slots_RS,
        loads_KE,
        home_slots,
        num_nodes,
        max_steps,
        max_experts,
        max_slots,
        trials,
        worst_weight,
        replica_price,
        change_price,
        home_price,
        min_gain,
        enough,
    )
    return new_RS, imbalance_K, value_2


def paying_replicas(
    loads_KE: Tensor, slots_RS: Tensor, home_slots: int, price_23: Tensor, num_nodes: int = 1
) -> Tensor:
    """Clears the spare slots of one layer whose replicas cost more time than they save.

    Returns the same as its numpy twin, megatron_smartmoe.placement.paying_replicas.without_losing_replicas, which
    explains the method. It runs on the host in one thread without the interpreter's lock, and only from the compiled
    library.

    Args:
        loads_KE: tokens of each expert in one load or several, int64 [K, E] on the CPU.
        slots_RS: expert in each slot, int64 [R, S] on the CPU, -1 for none.
        home_slots: columns of homes, E / R.
        price_23: tokens of the busiest rank that take as long as one transfer inside a node, as one between nodes, and
            as what hides all of them: of the weights, then of the gradients; float64 [2, 3] on the CPU.
        num_nodes: nodes that the ranks lie on.

    Returns:
        The slots, int64 [R, S].

    Raises:
        RuntimeError: a dtype, shape or number is wrong, the slots are no placement, a load is negative, the loads of a
            row add up to 2^63 or more, a tensor is on a GPU, or the library is not built.
    """
    new_RS: Tensor = torch.ops.smartmoe.paying_replicas(loads_KE, slots_RS, home_slots, price_23, num_nodes)
    return new_RS


def exact_plan(
    load_E: Tensor,
    slots_RS: Tensor,
    home_slots: int,
    *,
    scope_nodes: int,
    or_group: bool,
    limit: float,
    price_23: Tensor,
    num_nodes: int = 1,
) -> tuple[Tensor, int]:
    """Plans the replicas of one micro-batch from the exact load of each expert, as many as pay, where they pay.

    Returns the same as its numpy twin, megatron_smartmoe.placement.exact_plan.cheapest_exact_plan, which explains the
    method. It runs on the host in one thread without the interpreter's lock, and only from the compiled library.

    Args:
        load_E: tokens of each expert, int64 [E] on the CPU; their sum is below 2^63.
        slots_RS: expert in each slot, int64 [R, S] on the CPU. Each expert has one home; the contents of the spare
            slots are ignored.
        home_slots: columns of homes, E / R.
        scope_nodes: nodes, R / scope_nodes consecutive ranks each, that replicas stay on; 1 for anywhere.
        or_group: whether they may be anywhere where that is cheaper.
        limit: max / mean up to which homes, nodes, or a plan with its transfers are good enough.
        price_23: see `paying_replicas`.
        num_nodes: nodes that the ranks lie on, which the price is for.

    Returns:
        The slots, int64 [R, S], -1 for an empty one; and the nodes that their replicas stay on, 1 for anywhere.

    Raises:
        RuntimeError: a dtype, shape or number is wrong, a load is negative, the loads add up to 2^63 or more, an expert
            has no home or two, a tensor is on a GPU, or the library is not built.
    """
    found: tuple[Tensor, int] = torch.ops.smartmoe.exact_plan(
        load_E, slots_RS, home_slots, scope_nodes, or_group, limit, price_23, num_nodes
    )
    return found


def relay_tree(slots_RS: Tensor, home_slots: int, num_nodes: int = 1) -> Tensor:
    """Which rank feeds each replica, and in which round.

    Returns the same as its numpy twin, megatron_smartmoe.placement.relay.relay_tree, which explains the method. It runs
    on the host in one thread without the interpreter's lock, and only from the compiled library.

    Args:
        slots_RS: expert in each slot, int64 [R, S] on the CPU, -1 for none.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on.

    Returns:
        The rank that feeds each spare slot, the column of the slot table in which that rank has the expert, and the
        round, int64 [3, R, K]; -1 throughout for an empty slot.

    Raises:
        RuntimeError: a dtype, shape or number is wrong, the slots are no placement, the tensor is on a GPU, or the
            library is not built.
    """
    tree_3RK: Tensor = torch.ops.smartmoe.relay_tree(slots_RS, home_slots, num_nodes)
    return tree_3RK


def relayed_flow(
    counts_RE: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int, kept_RS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What of a layer decides its time: the best split, its traffic, and the transfers of replicas along their trees.

    Returns the same as its numpy twin, megatron_smartmoe.placement.layer_cost.relayed_layer. It runs on the host in one
    thread without the interpreter's lock, and only from the compiled library.

    Args:
        counts_RE: tokens of source rank r for expert e, int64 on the CPU.
        slots_RS: expert in each slot, int64 [R, S] on the CPU, homes first, -1 for none.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on.
        kept_RS: other slots, of whose replicas the transfers are counted too.

    Returns:
        The tokens that each rank sends to each, float64 [R, R]; each rank's tokens and its experts with tokens, int64
        [2, R]; and, int64 [5], the tokens for homes on the rank with replicas that has fewest of them, and the
        transfers that follow one another inside nodes and between them, of the slots and of `kept_RS`.

    Raises:
        RuntimeError: a dtype, shape or number is wrong, the slots are no placement, a count is negative, the counts add
            up to 2^63 or more, a tensor is on a GPU, or the library is not built.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.smartmoe.relayed_flow(
        counts_RE, slots_RS, home_slots, num_nodes, kept_RS
    )
    return found


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
    """Plans one micro-batch for one rank in one call: replicas, split, source ranks, exchange sizes and segments.

    megatron_smartmoe.runtime.replicas.dispatch_plan has its twin and the parts of `plan`. It runs on the host in one
    thread without the interpreter's lock, and only from the compiled library.

    Args:
        counts_RPE: tokens of each source rank for each expert, int64 [R, P, E] on the CPU, contiguous. P ranks share
            an expert.
        slots_RS: expert in each slot, int64 [R, S] on the CPU, -1 for none, contiguous; experts are numbered by their
            homes. Where replicas are planned, they are written here.
        home_slots: columns of homes, E / R.
        num_nodes: nodes that the ranks lie on; a replica on a token's own node is preferred.
        rank: this rank.
        tp_rank: which of the P this rank is.
        used_slots: spare slots of a rank to plan replicas for; None uses the replicas of slots_RS.
        scope_nodes: nodes to plan with: a replica stays on its home's node.
        or_group: whether replicas may be anywhere in the group where that is cheaper.
        limit: max / mean tokens per rank of the homes alone up to which no replica is planned.
        price_23: see `paying_replicas`.
        plan: the result, int64 on the CPU, contiguous; see PlanBuffer.

    Raises:
        RuntimeError: a dtype, shape or number is wrong, a count is negative, the counts add up to 2^63 or more, the
            slots are no placement, a tensor is on a GPU, or the library is not built.
    """
    torch.ops.smartmoe.plan_dispatch(
        counts_RPE,
        slots_RS,
        home_slots,
        num_nodes,
        rank,
        tp_rank,
        used_slots,
        scope_nodes,
        or_group,
        limit,
        price_23,
        plan,
    )


def dispatch_map(ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Sorts the choices of tokens by the slot of the chosen expert, with a stable counting sort.

    Rows are ordered by slot, within a slot by token, within a token by choice: Megatron's `permute` has the same order.
    A token that chooses an expert twice has two rows. The result has the same bits on every run; the host never waits
    for the GPU.

    Args:
        ids_TK: logical experts that tokens chose, int32 or int64 [T, K_top], in any order of choices; T x K_top below
            2^31. Ids outside [0, E), such as -1, are dropped.
        slot_of_E: the slot of each logical expert, int32 or int64 [E]. Experts whose slot is outside [0, num_slots)
            are dropped. E may differ from num_slots.
        num_slots: slots to sort into, 1 to 2048.

    Returns:
        rows_TK: row of the permuted buffer for each choice, int32 [T, K_top]; -1 where it was dropped. The others are
            0..N-1, each once, with N the sum of tokens_S: T x K_top if nothing was dropped.
        tokens_S: rows of each slot, int64 [num_slots].

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    rows_TK, tokens_S = torch.ops.smartmoe.dispatch_map(ids_TK, slot_of_E, num_slots)
    return rows_TK, tokens_S


def permute(x_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """Copies each token's row to the places of its choices: y[rows[t, j]] = x[t].

    Its gradient is `unpermute` without weights: summed in the order of the choices, in float32 (float64 for float64).

    Args:
        x_TH: a row per token, [T, H], any dtype and strides; floating point for a gradient.
        rows_TK: `dispatch_map`'s rows, int32 [T, K_top]: no row twice. Choices with a row outside [0, num_rows), such
            as -1, are skipped.
        num_rows: N, rows of the result. At least the sum of tokens_S keeps every choice; the host knows it as
            T x K_top where nothing is dropped, and may pass that also where something is.

    Returns:
        y_NH: [num_rows, H] in the dtype of x_TH. Rows that no choice names are zero.

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    y_NH: Tensor = torch.ops.smartmoe.permute(x_TH, rows_TK, num_rows)
    return y_NH


def unpermute(y_NH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Sums each token's rows back: x[t] = sum over j of weights[t, j] * y[rows[t, j]], or without weights.

    Summed in float32 (float64 for float64) as ((0 + choice 0) + choice 1) + ..., rounded once at the end. The order is
    that of the choices, not of the slots, so any placement of the experts gives the same bits. Megatron's `unpermute`
    adds in the order of slots and in the dtype of the rows: in float32 the two agree for two choices, not for more.

    Args:
        y_NH: rows sorted by slot, float16, bfloat16, float32 or (CPU only) float64 [N, H], any strides.
        rows_TK: `dispatch_map`'s rows, int32 [T, K_top]. Choices with a row outside [0, N) add nothing.
        weights_TK: a factor per choice, [T, K_top] in float32 or in the dtype of y_NH; None for a plain sum.

    Returns:
        x_TH: [T, H] in the dtype of y_NH. Gradients flow to y_NH and to weights_TK, whose dot products are summed in
        float32 and rounded once to its dtype.

    Raises:
        RuntimeError: a dtype, shape or device is wrong.
    """
    x_TH: Tensor = torch.ops.smartmoe.unpermute(y_NH, rows_TK, weights_TK)
    return x_TH


def swiglu(inner_NG: Tensor, probs_N: Tensor) -> Tensor:
    """The activation of gated experts times each row's probability: out[n] = silu(gate[n]) * linear[n] * probs[n].

    Computed in float32 (float64 for float64) from the inputs to the result, which is rounded once. In float32 it agrees
    with torch's own silu to rounding, not to the bit: the two compute the exponential differently. No rows, no launch.

    Args:
        inner_NG: gate and linear part of each row, float16, bfloat16, float32 or (CPU only) float64 [N, 2 F], the
            gate's columns first, any strides.
        probs_N: the router's probability of each row, [N] in float32 or in the dtype of inner_NG.

    Returns:
        out_NF: [N, F] in the dtype of inner_NG. Gradients flow to inner_NG and to probs_N, whose dot products are
        summed in float32 and rounded once to its dtype.

    Raises:
        RuntimeError: a dtype, shape or device is wrong.
    """
    out_NF: Tensor = torch.ops.smartmoe.swiglu(inner_NG, probs_N)
    return out_NF


def permute_weighted(x_TH: Tensor, weights_TK: Tensor, rows_TK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`permute`, and each choice's weight at the place of its row: w[rows[t, j]] = weights[t, j].

    Args:
        x_TH: a row per token, [T, H], any dtype and strides; on a GPU float16, bfloat16 or float32 for a gradient.
        weights_TK: a weight per choice, [T, K_top], of any floating-point type.
        rows_TK: as for `permute`.
        num_rows: as for `permute`.

    Returns:
        y_NH: as from `permute`.
        weights_N: [num_rows] in the dtype of weights_TK; zero for rows that no choice names. The gradient of a choice
        that names no row is zero.

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    y_NH, weights_N = torch.ops.smartmoe.permute_weighted(x_TH, weights_TK, rows_TK, num_rows)
    return y_NH, weights_N


def permute_packed(
    x_TH: Tensor,
    weights_TK: Tensor,
    rows_TK: Tensor,
    num_rows: int,
    *,
    more_TH: Tensor | None = None,
    more_weights_TK: Tensor | None = None,
) -> Tensor:
    """`permute_weighted` into one buffer, each weight behind its row; see `packed`.

    Args:
        x_TH: a row per token, float16, bfloat16, float32 or float64 [T, H], any strides.
        weights_TK: a weight per choice, [T, K_top], of any floating-point type.
        rows_TK: as for `permute`, of all tokens.
        num_rows: as for `permute`.
        more_TH: the rows of further tokens, in other memory.
        more_weights_TK: their weights.

    Returns:
        packed_NP: [num_rows, P] in the dtype of x_TH; `packed.unpack` gives the two parts. What lies between them is
        unwritten memory. Gradients flow as those of `permute_weighted`.

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    packed_NP: Tensor = torch.ops.smartmoe.permute_packed(x_TH, weights_TK, more_TH, more_weights_TK, rows_TK, num_rows)
    return packed_NP


def permute_joined(x_TH: Tensor, more_TH: Tensor, rows_TK: Tensor, num_rows: int) -> Tensor:
    """`permute` on tokens in two pieces of memory, as if they were joined. It has no gradient of its own.

    Args:
        x_TH: a row per token, [T, H], any dtype and strides.
        more_TH: the rows of further tokens, of the same dtype.
        rows_TK: as for `permute`, of all tokens.
        num_rows: as for `permute`.

    Returns:
        y_NH: as from `permute`.

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    y_NH: Tensor = torch.ops.smartmoe.permute_joined(x_TH, more_TH, rows_TK, num_rows)
    return y_NH


def chosen_experts(routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each token in ascending order, and their probabilities, from the router's map.

    Args:
        routing_map_TE: whether a token chose an expert, bool [T, E].
        probs_TE: the router's probabilities, of any floating-point type.
        top_k: the largest number of experts that a token chooses; further ones are left out.

    Returns:
        ids_TK: int32 [T, top_k]; E where a token has fewer.
        weights_TK: [T, top_k] in the dtype of probs_TE; zero where a token has fewer. Gradients flow to the
        probabilities of the chosen experts and are zero for the others.

    Raises:
        RuntimeError: a dtype, shape, number or device is wrong.
    """
    ids_TK, weights_TK = torch.ops.smartmoe.chosen_experts(routing_map_TE, probs_TE, top_k)
    return ids_TK, weights_TK


def chunk_rows(counts_QS: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where rows go that arrive in chunks, one for each (source, slot), when the chunks are sorted by slot.

    The host never waits for the GPU: it has to know the number of rows, and nothing else.

    Args:
        counts_QS: rows in the chunk of source q for slot s, int64 [Q, S].
        num_rows: N, their sum.

    Returns:
        to_slots_N: for each row as it arrives, its place in the order (slot, source), int32 [N].
        to_sources_N: the way back: for each place, the row as it arrived, int32 [N].

    Raises:
        RuntimeError: a dtype, shape or number is wrong; on the CPU also when the counts have another sum.
    """
    to_slots_N, to_sources_N = torch.ops.smartmoe.chunk_rows(counts_QS, num_rows)
    return to_slots_N, to_sources_N
