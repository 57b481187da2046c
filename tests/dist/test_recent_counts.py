"""The last iterations' counts, apart and in order, from one group of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

LAYERS, EXPERTS = (2, 5), 3


def _run(iterations: int, shares: int) -> Any:
    """Rank r routes 10 x iteration + micro-batch + 1 tokens to expert r, in the sampled layer 5 one more."""
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.runtime.recent_counts import RecentCounts

    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    counts = RecentCounts(LAYERS, EXPERTS, iterations=3, micro_batches=2, device="cpu")
    for iteration in range(1, iterations + 1):
        if iteration > 1:
            counts.end_iteration()
        for batch in range(4):
            for layer in LAYERS:
                tokens = 10 * iteration + batch + 1 + (layer == 5)
                routed_TE = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
                routed_TE[:, rank % 2] = True
                counts.add(layer, routed_TE.sum(dim=0))
    return counts.collect(rank % 2, 2, is_reporter=rank < 2 * shares, shares=shares)


@pytest.mark.parametrize(("iterations", "known"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [3, 4, 5])])
def test_the_latest_iterations_in_their_order(iterations: int, known: list[int], tmp_path: Path) -> None:
    results = run_ranks(_run, 2, iterations, 1, log_dir=tmp_path)
    for totals_ILE, batches_BLRE in results:
        assert totals_ILE.shape == (len(known), 2, EXPERTS)
        assert totals_ILE[:, 0, 0].tolist() == totals_ILE[:, 0, 1].tolist() == [40 * at + 10 for at in known]
        assert totals_ILE[:, 1, 0].tolist() == [40 * at + 14 for at in known]
        assert not totals_ILE[:, :, 2].any()
        assert batches_BLRE.shape == (2, 2, 2, EXPERTS)
        first = 10 * iterations + 1
        assert batches_BLRE[0, 0].tolist() == [[first, 0, 0], [0, first, 0]]  # by source rank
        assert batches_BLRE[1, 1].tolist() == [[first + 2, 0, 0], [0, first + 2, 0]]


@pytest.mark.parametrize("shares", [1, 2])
def test_one_group_reports_and_expert_tensor_ranks_are_averaged(shares: int, tmp_path: Path) -> None:
    expected = run_ranks(_run, 2, 3, 1, log_dir=tmp_path / "two")[0]
    found = run_ranks(_run, 4, 3, shares, log_dir=tmp_path / "four")[3]
    for got, wanted in zip(found, expected, strict=True):
        assert np.array_equal(got, wanted)
