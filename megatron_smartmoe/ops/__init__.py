"""Kernels as torch ops: torch.ops.smartmoe.* from the compiled library, or from torch where it is not built.

T tokens, K_top top-k, E experts, R ranks, S slots of a rank, N rows sorted by slot, H hidden size. Every op has a twin
that defines what it computes, and a fake kernel for torch.compile. The twin of a kernel is in reference.py; the twins
of the host ops are numpy functions: min_max_split and exact_replicas of megatron_smartmoe.placement, and
megatron_smartmoe.checkpoint.digest.digest.
`backend()` returns what serves the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.library import SlowOpsWarning, backend

__all__ = [
    "SlowOpsWarning",
    "backend",
    "digest_sum",
    "dispatch_map",
    "exact_replicas",
    "min_max_split",
    "permute",
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


def exact_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int = 1) -> Tensor:
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

    Returns:
        slots_RS: the same homes and new replicas, -1 for an empty slot, int64 [R, S].

    Raises:
        RuntimeError: a dtype, shape or number is wrong, a load is negative, the loads add up to 2^63 or more, an expert
            has no home or two, a tensor is on a GPU, or the library is not built.
    """
    new_RS: Tensor = torch.ops.smartmoe.exact_replicas(load_E, slots_RS, home_slots, num_nodes)
    return new_RS


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
