"""Whether all ranks hold the same result, from one all-reduce of its digest."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def digest_bounds(digest: str, device: torch.device | str | int) -> torch.Tensor:
    """The tensor to all-reduce with MAX: 60 bits of a hexadecimal digest and their negative, int64 `[2]`."""
    number = int(digest[:15], 16)
    return torch.tensor([number, -number], dtype=torch.int64, device=device)


def is_one_digest(bounds: Sequence[int]) -> bool:
    """Whether reduced bounds come from one digest: its maximum over the ranks is its minimum too."""
    highest, negated_lowest = bounds
    return highest == -negated_lowest
