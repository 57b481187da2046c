"""Routing maps with given counts: they add up, and no token meets an expert twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.runtime.replay import forced_map, scaled_counts


@given(
    counts=st.lists(st.integers(0, 10**6), min_size=4, max_size=16),
    num_tokens=st.integers(1, 200),
    top_k=st.integers(1, 4),
)
def test_scaled_counts_add_up(counts: list[int], num_tokens: int, top_k: int) -> None:
    scaled_E = scaled_counts(np.array(counts), num_tokens, top_k)
    assert scaled_E.sum() == num_tokens * top_k
    assert scaled_E.min() >= 0
    assert scaled_E.max() <= num_tokens
    map_TE = forced_map(scaled_E, num_tokens)
    assert map_TE.sum(dim=0).tolist() == scaled_E.tolist()
    assert (map_TE.sum(dim=1) == top_k).all()


def test_scaled_counts_by_hand() -> None:
    # 90 of 100 is more than half: expert 0 gets every token once, the others share the rest 8 : 2
    assert scaled_counts(np.array([90, 8, 2]), 10, 2).tolist() == [10, 8, 2]
    assert scaled_counts(np.array([5, 5, 5]), 10, 1).tolist() == [4, 3, 3]
