"""Whether all ranks came to the same result: its digest as two numbers, whose maxima over the ranks tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def digest_bounds(digest: str, device: torch.device | str | int) -> torch.Tensor:
    """What to all-reduce with MAX: 60 bits of a digest (hexadecimal) and their negative, int64 `[2]`."""
    number = int(digest[:15], 16)
    return torch.tensor([number, -number], dtype=torch.int64, device=device)


def is_one_digest(bounds: Sequence[int]) -> bool:
    """Whether reduced bounds come from one digest: the largest of any rank is the smallest too."""
    highest, negated_lowest = bounds
    return highest == -negated_lowest
