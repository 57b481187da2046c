"""The busiest rank is the one with the longest GEMMs, not always the one with the most tokens."""

import numpy as np
import pytest

from megatron_smartmoe.cost.compute import ExpertShape, busiest_rank, time_shared


def test_few_tokens_in_many_experts_may_take_longer() -> None:
    # Rank 0: 12 tokens in one expert; rank 1: 3 + 3 + 4 = 10 in three. At 2 tokens per active expert: 14 and 16.
    load_ER = np.array([[12, 0], [0, 3], [0, 3], [0, 4]], dtype=float)
    tokens_R, active_R = load_ER.sum(axis=0), (load_ER > 0).sum(axis=0)
    assert busiest_rank(tokens_R, active_R, 0.0).rank == 0
    busy = busiest_rank(tokens_R, active_R, 2.0)
    assert (busy.rank, busy.tokens, busy.active_experts) == (1, 10, 3)


@pytest.mark.parametrize(
    ("work_R", "shared", "seconds"),
    [
        ([1.0, 4.0, 2.0], 1.0, 4.0),  # a device each: the longest
        ([2.0, 2.0, 2.0, 2.0], 2.0, 2.0),  # four ranks on two cores, always all busy
        ([1.0, 1.0, 3.0, 3.0], 2.0, 2.0),  # two of them left: a core each, twice as fast
        ([0.0, 0.0, 0.0, 4.0], 2.0, 2.0),  # one alone uses one core, not both
        ([0.0, 4.0], 1.25, 3.2),
    ],
)
def test_ranks_that_share_cores_take_over_those_that_wait(work_R: list[float], shared: float, seconds: float) -> None:
    assert time_shared(work_R, shared) == pytest.approx(seconds)


def test_a_hot_rank_costs_less_where_cores_are_shared() -> None:
    busy = busiest_rank(np.array([10.0, 10.0, 30.0, 30.0]), np.ones(4, dtype=np.int64), 0.0, ranks_per_device=2.0)
    assert (busy.rank, busy.tokens) == (2, pytest.approx(20.0))
    assert busy.active_experts == pytest.approx(20 / 30)


def test_expert_sizes() -> None:
    # Three 4 x 6 matrices: 72 weights, 2 bytes each, 6 operations per weight and token.
    gated = ExpertShape(hidden=4, ffn=6)
    assert (gated.num_params, gated.weight_bytes, gated.gradient_bytes, gated.token_bytes) == (72, 144, 288, 8)
    assert gated.flops_per_token == 432
    assert ExpertShape(hidden=4, ffn=6, gated=False).num_params == 48
