"""What every rule keeps, whatever the load: experts placed, tokens conserved, slots within their number, no state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, host_counts
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.placement.cases import contiguous_slots, random_counts, random_slots, rank_loads

HOMES_FIXED = ("fastermoe", "echo", "ultraep", "ultraep-min1", "llep", "moonep", "lplb")
SLOTS_BOUND = (
    "none",
    "smartmoe2023",
    "lpt",
    "eplb",
    "eplb-hierarchical",
    "echo",
    "ultraep",
    "ultraep-min1",
    "laer",
    "epic",
    "lplb",
)

shapes = st.tuples(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1))


def drawn(shape: tuple[int, int, int, int]) -> LayerProblem:
    num_ranks, experts_per_rank, spare_slots, seed = shape
    rng = np.random.default_rng(seed)
    num_experts = num_ranks * experts_per_rank
    counts_RE = random_counts(rng, num_ranks, num_experts, sigma=2.0, tokens=int(rng.integers(0, 200)))
    slots_RS = random_slots(rng, num_experts, num_ranks, spare_slots)
    return LayerProblem(
        counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=spare_slots, num_nodes=2 if num_ranks > 2 else 1
    )


@pytest.mark.parametrize("name", by_name())
@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_every_rule(name: str, shape: tuple[int, int, int, int]) -> None:
    problem = drawn(shape)
    before = problem.counts_RE.copy(), problem.slots_RS.copy()
    rule = by_name()[name]
    plan = rule.plan(problem)
    assert (host_counts(plan.slots_RS, problem.num_experts).sum(axis=1) >= 1).all()
    assert rank_loads(plan, problem.counts_RE).sum() == pytest.approx(problem.counts_RE.sum())
    other_RE = random_counts(np.random.default_rng(1), problem.num_ranks, problem.num_experts)
    assert rank_loads(plan, other_RE).sum() == pytest.approx(other_RE.sum())
    assert np.array_equal(rule.plan(problem).slots_RS, plan.slots_RS)
    assert np.array_equal(before[0], problem.counts_RE)
    assert np.array_equal(before[1], problem.slots_RS)
    if name in HOMES_FIXED:
        assert np.array_equal(plan.slots_RS[:, : problem.home_slots], problem.slots_RS[:, : problem.home_slots])
    if name in SLOTS_BOUND:
        assert plan.slots_RS.shape[1] == problem.home_slots + problem.spare_slots
    if plan.quota_ER is not None:
        assert np.array_equal(plan.quota_ER.sum(axis=1), problem.load_E)
        assert (plan.quota_ER >= 0).all()
        assert (host_counts(plan.slots_RS, problem.num_experts)[plan.quota_ER > 0] == 1).all()


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_exact_rules_never_exceed_no_balancing(shape: tuple[int, int, int, int]) -> None:
    problem = drawn(shape)
    homes = LayerPlan(slots_RS=problem.slots_RS[:, : problem.home_slots], split="equal")
    now = rank_loads(homes, problem.counts_RE).max()
    for name in ("echo", "ultraep", "ultraep-min1", "moonep"):
        assert rank_loads(by_name()[name].plan(problem), problem.counts_RE).max() <= now + 1e-9


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_moonep_is_exact(shape: tuple[int, int, int, int]) -> None:
    problem = drawn(shape)
    load_R = rank_loads(by_name()["moonep"].plan(problem), problem.counts_RE)
    assert load_R.max() - load_R.min() <= 1 + 1e-9


def test_without_tokens_nothing_is_copied() -> None:
    problem = LayerProblem(
        counts_RE=np.zeros((4, 8), dtype=np.int64), slots_RS=contiguous_slots(8, 4, 1), spare_slots=1
    )
    for name in HOMES_FIXED:
        slots_RS = by_name()[name].plan(problem).slots_RS
        assert (slots_RS[:, 2:] == EMPTY).all()
