"""Counts of an iteration, every pass through a layer apart."""

from __future__ import annotations

import torch

from megatron_smartmoe.runtime.counts import PassCounts


def test_passes_are_kept_in_their_order_and_one_too_many_shows() -> None:
    counts = PassCounts(layers=[3, 5], passes=2, num_experts=2, device="cpu")
    for layer, tokens in ((3, [1, 2]), (5, [3, 4]), (3, [5, 6])):
        counts.add(layer, torch.tensor(tokens))
    assert counts.local_LPE.tolist() == [[[1, 2], [5, 6]], [[3, 4], [0, 0]]]
    assert counts.is_complete
    counts.add(3, torch.tensor([7, 8]))  # an iteration that is run again
    assert not counts.is_complete
    counts.reset()
    assert counts.is_complete
    assert not counts.local_LPE.any()
