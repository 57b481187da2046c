"""Argument checks of the torch twins and the fake kernels.

The compiled kernels check for themselves, in csrc/checks.h, with the same rules and texts: torch.ops reaches them past
everything written in Python, and they must never read out of bounds. A test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_EXPERTS = 4096  # kMaxExperts of csrc/checks.h


def check_ids(ids: Tensor) -> None:
    """Raises RuntimeError, as the compiled op does, unless ids is int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        dtype = str(ids.dtype).removeprefix("torch.")
        raise RuntimeError(f"ids.dtype = {dtype}: it must be int32 or int64. Convert it with ids.long()")


def check_num_experts(num_experts: int) -> None:
    """Raises RuntimeError, as the compiled op does, unless num_experts is in 1..MAX_EXPERTS."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        way_out = "Pass the number of logical experts of the layer"
        raise RuntimeError(f"num_experts = {num_experts}: it must be in 1..{MAX_EXPERTS}. {way_out}")
