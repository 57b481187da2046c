"""Kernels as torch ops: torch.ops.smartmoe.* from the compiled library, or from torch where it is not built.

T tokens, K_top top-k, E experts, R ranks, S slots of a rank. Every op has a twin that says what it computes, and a fake
kernel for torch.compile. The twin of a kernel is in reference.py; those of the host ops, min_max_split and
exact_replicas, are the numpy functions of that name in megatron_smartmoe.placement. `backend()` tells what serves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.library import SlowOpsWarning, backend

__all__ = ["SlowOpsWarning", "backend", "exact_replicas", "expert_histogram", "min_max_split"]


def expert_histogram(ids: Tensor, num_experts: int) -> Tensor:
    """Counts how often each expert was chosen.

    The counts are int64, as Megatron's tokens_per_expert and torch.bincount are: there can be more than 2^31 ids, and E
    numbers cost nothing. They are the same bits on every run. The host never waits for the GPU.

    Args:
        ids: the experts that tokens chose, int32 or int64, any shape (usually [T, K_top]) and strides. Ids outside
            [0, num_experts), such as -1 for a dropped token, are not counted.
        num_experts: E, 1 to 4096.

    Returns:
        counts_E, int64 [num_experts], on the device of ids, in tokens x top-k assignments.

    Raises:
        RuntimeError: ids is of another dtype, or num_experts is out of its range.
    """
    counts_E: Tensor = torch.ops.smartmoe.expert_histogram(ids, num_experts)
    return counts_E


def min_max_split(counts_RE: Tensor, hosts_ER: Tensor) -> Tensor:
    """Splits each expert's tokens over its copies with the smallest possible largest rank load.

    The same integers as megatron_smartmoe.placement.split.min_max_split, its numpy twin, which tells the method. On the
    host, one thread; there is no slow version of it here.

    Args:
        counts_RE: tokens of source rank r for expert e, int64 [R, E] on the CPU, R at least 1; their sum is below 2^63.
        hosts_ER: whether rank r holds a copy of expert e, bool [E, R] on the CPU.

    Returns:
        tokens_ER: tokens of expert e that rank r takes, int64 [E, R].

    Raises:
        RuntimeError: a dtype or shape is another, a count is negative, an expert has tokens and no copy, a tensor is on
            a GPU, or the library is not built.
    """
    tokens_ER: Tensor = torch.ops.smartmoe.min_max_split(counts_RE, hosts_ER)
    return tokens_ER


def exact_replicas(load_E: Tensor, slots_RS: Tensor, home_slots: int, num_nodes: int = 1) -> Tensor:
    """Plans the replicas of one micro-batch from the exact load of each expert.

    The same slots as megatron_smartmoe.placement.exact.exact_replicas, its numpy twin, which tells the method. On the
    host, one thread; there is no slow version of it here.

    Args:
        load_E: tokens of each expert, int64 [E] on the CPU; their sum is below 2^63.
        slots_RS: expert in each slot, int64 [R, S] on the CPU, R at least 1. The homes are each expert once; what the
            spare slots hold is not looked at.
        home_slots: columns of homes, E / R.
        num_nodes: a replica stays on the node of its home; the ranks lie on this many, R / num_nodes consecutive ones
            each.

    Returns:
        slots_RS: the same homes and new replicas, -1 for an empty slot, int64 [R, S].

    Raises:
        RuntimeError: a dtype, shape or number is another, a load is negative, the homes are not each expert once, a
            tensor is on a GPU, or the library is not built.
    """
    new_RS: Tensor = torch.ops.smartmoe.exact_replicas(load_E, slots_RS, home_slots, num_nodes)
    return new_RS
