"""The ops on tensors without data, for torch.compile and meta devices: checks, shapes and dtypes, nothing computed."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.checks import check_ids, check_num_experts


def expert_histogram(ids: Tensor, num_experts: int) -> Tensor:
    """Shape of smartmoe::expert_histogram: counts_E int64 [num_experts]."""
    check_ids(ids)
    check_num_experts(num_experts)
    return ids.new_empty((num_experts,), dtype=torch.int64)
