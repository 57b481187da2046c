"""The ops in plain torch: a twin for each kernel, with its name and arguments.

They say what an op means, they are what its kernels are tested against, and they serve the op where no compiled library
does. On any device, without a host synchronisation; slower than the kernels and with more memory.

The host ops have none here: min_max_split is megatron_smartmoe.placement.split.min_max_split and exact_replicas is
megatron_smartmoe.placement.exact.exact_replicas, both in numpy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.checks import check_ids, check_num_experts


def expert_histogram(ids: Tensor, num_experts: int) -> Tensor:
    """Twin of smartmoe::expert_histogram: ids int32 or int64 of any shape -> counts_E int64 [num_experts]."""
    check_ids(ids)
    check_num_experts(num_experts)
    flat = ids.reshape(-1)
    # ids of no expert are counted in a bin of their own: selecting by a mask would make a GPU's host wait for the size
    in_range = (flat >= 0) & (flat < num_experts)
    bins = torch.where(in_range, flat, num_experts).long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts].clone()
