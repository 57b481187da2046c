"""Routing maps with given counts per expert, for replaying a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_smartmoe.spec.arrays import IntArray


def scaled_counts(counts_E: NDArray[Any], num_tokens: int, top_k: int) -> IntArray:
    """Counts in the same proportions that add up to `num_tokens` x `top_k`, none above `num_tokens`.

    Each token chooses an expert at most once. What is above that bound goes to the other experts in proportion.
    """
    target, share_E = num_tokens * top_k, np.asarray(counts_E, dtype=np.float64)
    if share_E.sum() == 0 or np.count_nonzero(share_E) < top_k:
        share_E = share_E + max(1.0, share_E.sum() * 1e-6)  # too few experts to give each token k different ones
    # Step 1: scale the shares to the target; cap experts at one choice per token and scale the others up, until no
    # expert is above the cap.
    exact_E = np.zeros_like(share_E)
    free_E = np.ones(len(share_E), dtype=bool)
    while free_E.any():
        rest = target - num_tokens * int((~free_E).sum())
        exact_E[free_E] = share_E[free_E] * (rest / max(share_E[free_E].sum(), 1e-300))
        over_E = free_E & (exact_E > num_tokens)
        if not over_E.any():
            break
        exact_E[over_E], free_E[over_E] = num_tokens, False
    # Step 2: round down, then add 1 to the largest remainders, lower experts first among equal ones.
    whole_E = np.floor(exact_E + 1e-9).astype(np.int64)
    missing = target - int(whole_E.sum())
    room_E = whole_E < num_tokens
    order = np.lexsort((np.arange(len(share_E)), whole_E - exact_E, ~room_E))
    whole_E[order[:missing]] += 1
    return whole_E


def forced_map(counts_E: IntArray, num_tokens: int) -> torch.Tensor:
    """A routing map bool `[T, E]` with these column sums, and the same number of experts for every token.

    The choices of expert 0, then 1, and so on are dealt to the tokens round and round, so a token meets an expert at
    most once as long as no count is above the number of tokens.
    """
    experts = np.repeat(np.arange(len(counts_E)), counts_E)
    map_TE = torch.zeros(num_tokens, len(counts_E), dtype=torch.bool)
    map_TE[torch.arange(len(experts)) % num_tokens, torch.from_numpy(experts)] = True
    return map_TE
