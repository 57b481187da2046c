"""Kernels as torch ops: torch.ops.smartmoe.* from the compiled library, or from torch where it is not built.

T tokens, K_top top-k, E experts. Every op has a twin in reference.py that says what it computes, and a fake kernel for
torch.compile. `backend()` tells what serves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe.ops.library import SlowOpsWarning, backend

__all__ = ["SlowOpsWarning", "backend", "expert_histogram"]


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
