"""The assignment of tokens to experts with the largest total score, every expert getting the same number: an auction.

Tokens without an expert bid for the one that is worth most to them: as much as it is worth more than the second best,
and the increment. An expert keeps its highest bids; the lowest that it keeps is its price. When all tokens have an
expert, the total is within tokens x increment of the best one (Bertsekas 1988). Scores are rounded to integers and
multiplied by tokens + 1, so that an increment of 1 is exact for the rounded scores, on every machine alike. Larger
increments first, whose prices the smaller ones start from, keep the number of rounds down.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LEVELS = 1 << 20  # of the rounded scores, from the smallest to the largest
_SHRINK = 8  # each increment is the last one divided by it

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def balanced_assignment(scores_TE: FloatArray) -> IntArray:
    """The expert of each token, int64 `[T]`.

    Args:
        scores_TE: finite; T a multiple of E.
    """
    num_tokens, num_experts = scores_TE.shape
    capacity = num_tokens // num_experts
    if num_experts == 1:
        return np.zeros(num_tokens, dtype=np.int64)
    # Step 1: integers, whose differences are multiples of tokens + 1
    values_TE = rounded(scores_TE) * (num_tokens + 1)
    # Step 2: an auction with each increment, down to 1; prices stay
    prices_E = np.zeros(num_experts, dtype=np.int64)
    increment = max(1, int(np.ptp(values_TE)) // _SHRINK)
    while True:
        expert_T, prices_E = _auction(values_TE, prices_E, capacity, increment)
        if increment == 1:
            return expert_T
        increment = max(1, increment // _SHRINK)


def rounded(scores_TE: FloatArray) -> IntArray:
    """Scores as integers from 0 to 2^20; what differs less than a millionth of their range may become equal."""
    low, high = float(scores_TE.min()), float(scores_TE.max())
    scale = _LEVELS / (high - low) if high > low else 0.0
    return np.rint((scores_TE.astype(np.float64) - low) * scale).astype(np.int64)


def _auction(values_TE: IntArray, prices_E: IntArray, capacity: int, increment: int) -> tuple[IntArray, IntArray]:
    """One auction: the expert of each token, and the prices at its end."""
    num_tokens = len(values_TE)
    expert_T = np.full(num_tokens, -1, dtype=np.int64)
    bid_T = np.zeros(num_tokens, dtype=np.int64)
    prices_E = prices_E.copy()
    free_F = np.arange(num_tokens)
    while len(free_F):
        # Step 1: the bids of all tokens that have no expert
        worth_FE = values_TE[free_F] - prices_E
        best_F = worth_FE.argmax(axis=1)
        rows = np.arange(len(free_F))
        most_F = worth_FE[rows, best_F]
        worth_FE[rows, best_F] = np.iinfo(np.int64).min
        second_F = worth_FE.max(axis=1)
        expert_T[free_F] = best_F
        bid_T[free_F] = prices_E[best_F] + most_F - second_F + increment
        # Step 2: every expert that was bid for keeps its highest bids, the first tokens among equal ones
        for expert in np.unique(best_F):
            tokens = np.flatnonzero(expert_T == expert)
            if len(tokens) < capacity:
                continue
            order = np.argsort(-bid_T[tokens], kind="stable")
            prices_E[expert] = bid_T[tokens[order[capacity - 1]]]
            expert_T[tokens[order[capacity:]]] = -1
        free_F = np.flatnonzero(expert_T < 0)
    return expert_T, prices_E
