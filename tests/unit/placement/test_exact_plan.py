"""The cheapest replicas for exactly one load: each way to plan, within nodes and over the group, where it can save."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, LegPrice, TransferPrice
from megatron_smartmoe.placement import exact_plan
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions, cheapest_exact_plan
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import cost_of_replicas, without_losing_replicas
from megatron_smartmoe.placement.spilled_replicas import spilled_replicas
from megatron_smartmoe.runtime.replicas.split import compiled_exact_plan
from megatron_smartmoe.spec.arrays import IntArray
from tests.unit.placement.cases import LEGS, contiguous_slots, random_counts

BARE_RS = contiguous_slots(4, 4, 1)
TWO_NODES = TransferPrice(fetch=LegPrice(inside_tokens=10.0, between_tokens=20.0), num_nodes=2)


def test_homes_that_are_balanced_get_no_replicas() -> None:
    options = ExactPlanOptions(price=FREE_TRANSFERS, limit=1.03)
    assert (cheapest_exact_plan(np.array([102, 100, 100, 98]), BARE_RS, 1, options).slots_RS == BARE_RS).all()


@pytest.fixture(name="tried")
def _tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The ways that are tried, and the nodes for which."""
    found: list[tuple[str, int]] = []

    def counted(name: str, plan: Callable[..., IntArray]) -> Callable[..., IntArray]:
        def call(load_E: IntArray, slots_RS: IntArray, home_slots: int, num_nodes: int) -> IntArray:
            found.append((name, num_nodes))
            return plan(load_E, slots_RS, home_slots, num_nodes)

        return call

    monkeypatch.setattr(exact_plan, "exact_replicas", counted("exact", exact_replicas))
    monkeypatch.setattr(exact_plan, "spilled_replicas", counted("spilled", spilled_replicas))
    return found


@pytest.mark.parametrize(
    ("load", "price", "expected"),
    [
        ([300, 100, 200, 203], FREE_TRANSFERS, [("exact", 2)]),
        ([300, 100, 200, 203], TWO_NODES, [("exact", 2), ("spilled", 2)]),
        ([300, 100, 200, 230], FREE_TRANSFERS, [("exact", 2), ("exact", 1)]),
        ([300, 100, 200, 230], TWO_NODES, [("exact", 2), ("spilled", 2), ("exact", 1), ("spilled", 1)]),
        ([200, 200, 200, 201], TWO_NODES, []),
    ],
)
def test_only_what_can_save_is_tried(
    load: list[int], price: TransferPrice, expected: list[tuple[str, int]], tried: list[tuple[str, int]]
) -> None:
    options = ExactPlanOptions(num_nodes=2, or_group=True, price=price, limit=1.01)
    cheapest_exact_plan(np.array(load), BARE_RS, 1, options)
    assert tried == expected


def test_few_transfers_where_they_are_dear_and_balance_where_they_are_not() -> None:
    """Ranks 0 to 15 have all tokens, some more and some less than twice the mean."""
    rng = np.random.default_rng(3)
    load_E = np.concatenate([rng.integers(900, 1100, 64), np.zeros(64, dtype=np.int64)])
    bare_RS = contiguous_slots(128, 32, 2)
    mean = load_E.sum() / 32

    def planned(price_tokens: float) -> IntArray:
        options = ExactPlanOptions(price=TransferPrice.of_each(price_tokens), limit=1.0)
        return cheapest_exact_plan(load_E, bare_RS, 4, options).slots_RS

    balanced_RS, spilled_RS = exact_replicas(load_E, bare_RS, 4), spilled_replicas(load_E, bare_RS, 4)
    assert (planned(0.0) == balanced_RS).all()
    assert (planned(0.05 * mean) == spilled_RS).all()
    assert (planned(2 * mean) == bare_RS).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[IntArray, IntArray, int, ExactPlanOptions]:
    """Tokens, slots with homes in any order, home slots, and options."""
    num_experts, num_ranks, spare, num_nodes = draw(
        st.sampled_from([(16, 8, 1, 2), (32, 8, 2, 4), (64, 16, 1, 2), (24, 4, 2, 1), (128, 32, 2, 4), (8, 8, 0, 2)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load_E = random_counts(rng, num_ranks, num_experts, sigma=draw(st.floats(0.0, 2.0))).sum(axis=0)
    slots_RS, home_slots = contiguous_slots(num_experts, num_ranks, spare), num_experts // num_ranks
    if draw(st.booleans()):
        slots_RS[:, :home_slots] = rng.permutation(num_experts).reshape(num_ranks, -1)
    if draw(st.booleans()):  # idle ranks
        load_E[slots_RS[: num_ranks // 2, :home_slots].ravel()] = 0
    price = TransferPrice(fetch=draw(LEGS), back=draw(LEGS), num_nodes=num_nodes)
    scope = draw(st.sampled_from([1, num_nodes]))
    limit = draw(st.sampled_from([1.0, 1.01, 1.2]))
    options = ExactPlanOptions(num_nodes=scope, or_group=draw(st.booleans()), price=price, limit=limit)
    return load_E, slots_RS, home_slots, options


@settings(max_examples=60, deadline=None)
@given(problems())
def test_never_dearer_than_one_way_alone(problem: tuple[IntArray, IntArray, int, ExactPlanOptions]) -> None:
    load_E, slots_RS, home_slots, options = problem
    found = cheapest_exact_plan(load_E, slots_RS, home_slots, options)
    cost = cost_of_replicas(load_E, found.slots_RS, home_slots, options.price)
    one_RS = exact_replicas(load_E, slots_RS, home_slots, options.num_nodes)
    one_RS = without_losing_replicas(load_E[None], one_RS, home_slots, options.price)
    alone = cost_of_replicas(load_E, one_RS, home_slots, options.price)
    assert cost <= max(alone, options.limit * load_E.sum() / len(slots_RS)) + 1e-6


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_op_plans_the_same(problem: tuple[IntArray, IntArray, int, ExactPlanOptions]) -> None:
    load_E, slots_RS, home_slots, options = problem
    expected, found = (
        plan(load_E, slots_RS, home_slots, options) for plan in (cheapest_exact_plan, compiled_exact_plan)
    )
    assert (found.slots_RS == expected.slots_RS).all()
    assert found.num_nodes == expected.num_nodes
