"""The ops on tensors without data, for torch.compile and meta devices: checks, shapes and dtypes, nothing computed."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.checks import check_ids, check_num_experts, check_replicas, check_split


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
