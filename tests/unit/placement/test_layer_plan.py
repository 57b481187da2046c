"""Evaluating plans: equal, quota, local and exact sharing on a case small enough to do by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, SplitRule, evaluate
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.placement.cases import random_counts, random_slots, rank_loads

SLOTS = np.array([[0, 1, EMPTY], [2, 3, 0]])  # expert 0 on both ranks
COUNTS = np.array([[6, 1, 1, 0], [2, 1, 0, 3]])


@pytest.mark.parametrize(
    ("plan", "loads", "traffic"),
    [
        (LayerPlan(slots_RS=SLOTS, split="equal"), [6, 8], [[4, 4], [2, 4]]),
        (LayerPlan(slots_RS=SLOTS, split="exact"), [7, 7], [[6, 2], [1, 5]]),
        (LayerPlan(slots_RS=SLOTS, split="local", home_rank_E=np.array([0, 0, 1, 1])), [8, 6], [[7, 1], [1, 5]]),
        (
            LayerPlan(slots_RS=SLOTS, split="quota", quota_ER=np.array([[3, 1], [1, 0], [0, 1], [0, 0]])),
            [8, 6],
            [[5.5, 2.5], [2.5, 3.5]],
        ),
    ],
)
def test_four_ways_to_share(plan: LayerPlan, loads: list[float], traffic: list[list[float]]) -> None:
    outcome = evaluate(plan, COUNTS)
    assert rank_loads(plan, COUNTS).tolist() == loads
    assert outcome.load_ER.sum(axis=0).tolist() == loads
    assert outcome.traffic_RR.tolist() == traffic


@given(seed=st.integers(0, 2**32 - 1), split=st.sampled_from(["equal", "exact", "local", "quota"]))
def test_no_token_is_lost_and_traffic_arrives(seed: int, split: SplitRule) -> None:
    rng = np.random.default_rng(seed)
    counts_RE, slots_RS = random_counts(rng, 4, 16), random_slots(rng, 16, 4, 2)
    home_E = np.argsort(slots_RS[:, :4].ravel()) // 4
    plan = LayerPlan(slots_RS=slots_RS, split=split, quota_ER=np.zeros((16, 4), np.int64), home_rank_E=home_E)
    outcome = evaluate(plan, counts_RE)
    assert outcome.load_ER.sum(axis=1) == pytest.approx(counts_RE.sum(axis=0))
    assert outcome.traffic_RR.sum(axis=1) == pytest.approx(counts_RE.sum(axis=1))
    assert outcome.traffic_RR.sum(axis=0) == pytest.approx(outcome.load_ER.sum(axis=0))


def test_a_plan_that_lacks_something_says_so() -> None:
    with pytest.raises(PlanError, match="'quota' must carry quota_ER"):
        rank_loads(LayerPlan(slots_RS=SLOTS, split="quota"), COUNTS)
    with pytest.raises(PlanError, match="'local' must carry home_rank_E"):
        rank_loads(LayerPlan(slots_RS=SLOTS, split="local"), COUNTS)
    with pytest.raises(PlanError, match="expert 3 has 3 tokens and no slot"):
        rank_loads(LayerPlan(slots_RS=SLOTS % 3, split="equal"), COUNTS)


def test_what_a_rule_sees() -> None:
    problem = LayerProblem(counts_RE=COUNTS, slots_RS=SLOTS, spare_slots=1)
    assert (problem.num_ranks, problem.num_experts, problem.home_slots) == (2, 4, 2)
    assert problem.load_E.tolist() == [8, 2, 1, 3]
    assert problem.home_rank_E.tolist() == [0, 0, 1, 1]
