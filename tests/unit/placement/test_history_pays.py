"""Replicas from history are suspended in a layer where planning from exact counts alone is cheaper, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement import replica_planner
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.history_pays import JudgedPrices, Standing, saved_by_exact
from megatron_smartmoe.placement.kernels import NUMPY
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement

HOMES = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=4, spare_slots=1)
BARE = HOMES.slots_LRS[0]
UNEVEN = np.array([1000, 400, 300, 300, 500, 500, 500, 500])  # 1,000 tokens a rank; a replica of 0 on 1 evens them out


def with_replica(expert: int, rank: int) -> IntArray:
    slots_RS: IntArray = BARE.copy()
    slots_RS[rank, 2] = expert
    return slots_RS


def saved(
    prices: JudgedPrices,
    history_RS: IntArray,
    exact_RS: IntArray | None,
    *loads: IntArray,
    credit: float = 0.0,
    rank_tokens: float = 0.0,
) -> float:
    """What exact counts alone would have saved; with None, nothing may be planned from them."""

    def plan(load_E: IntArray) -> IntArray:
        assert exact_RS is not None, "planned, where that can change nothing"
        return exact_RS

    rank_tokens = rank_tokens or sum(float(load_E.sum()) for load_E in loads) / 4
    return saved_by_exact(credit, np.stack(loads), rank_tokens, history_RS, 2, prices, plan, NUMPY)


def prices(history: float, exact: float) -> JudgedPrices:
    """Of each transfer, nothing hidden."""
    each = (TransferPrice.of_each(tokens) for tokens in (history, exact))
    return JudgedPrices(history=next(each), exact=next(each), limit=1.01)


def test_the_example_of_the_module() -> None:
    useless_RS, perfect_RS, loads = with_replica(7, 1), with_replica(0, 1), UNEVEN
    assert saved(prices(70, 110), useless_RS, perfect_RS, loads) == pytest.approx(0.07)
    # a load that history has forecast: the same replica, fetched for less
    assert saved(prices(70, 110), perfect_RS, perfect_RS, loads) == pytest.approx(-0.04)
    # other micro-batches that serve history as well share the price of the fetch
    assert saved(prices(70, 110), perfect_RS, perfect_RS, loads, loads) == pytest.approx((70 - 2 * 110) / 2000)
    assert saved(prices(70, 110), perfect_RS, perfect_RS, loads, rank_tokens=2000) == pytest.approx(-150 / 2000)
    # homes alone, where exact replicas do not pay
    assert saved(prices(70, 500), useless_RS, BARE, loads) == pytest.approx(0.07)


def test_the_standing_turns_late_and_remembers_little() -> None:
    assert Standing().after(0.07) == Standing(credit=0.07, suspended=True)
    standing, found = Standing(credit=-0.1), []
    for share in (0.07, 0.07, 0.07, -0.05, -0.05, -0.05, 0.06):
        standing = standing.after(share)
        found.append((round(standing.credit, 3), standing.suspended))
    suspended = [(0.04, True), (0.1, True), (0.05, True), (0.0, True)]
    assert found == [(-0.03, False), *suspended, (-0.05, False), (0.01, False)]
    assert Standing(credit=0.1, suspended=True).after(-5.0, draw=13) == Standing(credit=-0.1, rest=8)


def test_nothing_is_planned_where_it_cannot_matter() -> None:
    far = with_replica(7, 1)
    assert saved(prices(9, 110), far, None, UNEVEN) == -0.01  # the fetch costs less than 1% of the tokens
    assert saved(prices(70, 110), BARE, None, UNEVEN) == 0.0  # history has planned none
    assert saved(prices(70, 110), far, None, np.zeros(8, np.int64), rank_tokens=1000) == 0.0
    # At least 1,000 + 450 from exact counts, or 1,400 with the homes alone: history has 1,400 + 70.
    unaided = saved(prices(70, 450), far, BARE, UNEVEN)
    assert unaided == pytest.approx(0.07)
    # From -10% a layer whose history is 50 tokens better stays there whatever the plan.
    perfect = with_replica(0, 1)
    assert saved(prices(60, 110), perfect, None, UNEVEN, credit=-0.1) == pytest.approx(-0.05)


def test_what_hides_the_new_transfers_does_not_hide_those_from_history_as_well() -> None:
    hidden = TransferPrice(fetch=LegPrice(inside_tokens=100.0, hidden_tokens=100.0))
    far, perfect = with_replica(7, 1), with_replica(0, 1)
    both = JudgedPrices(history=hidden, exact=hidden, limit=1.01)
    assert saved(both, far, perfect, UNEVEN) == pytest.approx(0.1)
    assert saved(both, perfect, perfect, UNEVEN) == 0.0


def test_home_rows_hide_less_where_a_rank_with_a_replica_has_few() -> None:
    """Rank 0 is the home of all tokens but a few; the others' homes are idle."""
    exact = TransferPrice(fetch=LegPrice(inside_tokens=300.0, hidden_tokens=300.0))
    judged = JudgedPrices(history=TransferPrice.of_each(50.0), exact=exact, limit=1.01)
    loads = np.array([2000, 0, 0, 0, 1000, 0, 1000, 0])
    perfect = with_replica(0, 1)
    assert saved(judged, perfect, perfect, loads) == pytest.approx(0.05 - 0.3)  # none at rank 1: all 300 show


PRICES = {"replica": ReplicaOptions(price=TransferPrice.of_each(60.0)), "exact_price": TransferPrice.of_each(80.0)}


def planner(**changed: Any) -> ReplicaPlanner:
    return ReplicaPlanner(HOMES, 0, OnlineOptions(replicas="auto", **{**PRICES, **changed}))


def steady(iteration: int) -> IntArray:
    return np.array([2000, 200, 250, 250, 400, 300, 300, 300])


def rotating(iteration: int) -> IntArray:
    """Another rank is hot in every iteration, and replicas for the one before are of no use."""
    return np.roll(steady(0), 2 * (5 * iteration % 4))


def run(one: ReplicaPlanner, load: Callable[[int], IntArray], iterations: range) -> list[Decision | None]:
    found = []
    for iteration in iterations:
        found.append(one.plan(iteration))
        one.observe(load(iteration)[None, None])
    return found


def replicas(one: ReplicaPlanner) -> int:
    return int((one.placement.slots_LRS[:, :, 2:] != EMPTY).sum())


def test_a_steady_load_keeps_its_replicas() -> None:
    one = planner()
    run(one, steady, range(12))
    assert not one.is_suspended(0)
    assert replicas(one) > 0


def test_a_load_that_cannot_be_forecast_loses_them_and_one_that_can_gets_them_back() -> None:
    one, log = planner(), []
    log += run(one, rotating, range(12))
    assert one.is_suspended(0)
    assert one.num_suspended == 1
    assert replicas(one) == 0
    assert (one.state()["planned_LRS"][:, :, 2:] != EMPTY).any(), "planned all the same, to be judged"
    run(one, steady, range(12, 24))
    assert not one.is_suspended(0)
    assert replicas(one) > 0
    (suspends,) = [each for each in log if each is not None and "suspended" in each.why]
    assert suspends.why.startswith("replicas from history suspended in 1 of 1 layers")
    names = {each.name.partition(": ")[2]: each.chosen for each in suspends.candidates}
    assert names["no replicas"]
    assert sum(names.values()) == 1


@pytest.mark.parametrize(
    "changed",
    [{"replicas": "history"}, {"replica": replace(PRICES["replica"], may_suspend=False)}],  # type: ignore[type-var]
)
def test_only_auto_suspends_and_not_in_runs_of_earlier_versions(changed: dict[str, Any]) -> None:
    one = ReplicaPlanner(HOMES, 0, replace(planner().options, **changed))
    run(one, rotating, range(12))
    assert not one.is_suspended(0)


def lines(found: list[Decision | None]) -> list[str]:
    return ["" if one is None else one.to_line() for one in found]


@pytest.mark.parametrize("stop", range(2, 16, 3))
def test_a_resumed_run_decides_as_the_uninterrupted_one(stop: int) -> None:
    def load(iteration: int) -> IntArray:
        return rotating(iteration) if iteration < 7 else steady(iteration)

    whole, first, second = planner(), planner(), planner()
    expected = lines(run(whole, load, range(18)))
    found = lines(run(first, load, range(stop)))
    second.restore(first.state())
    found += lines(run(second, load, range(stop, 18)))
    assert found == expected
    assert all(np.array_equal(whole.state()[name], array) for name, array in second.state().items())


NEWER = ("planned_LRS", "credit_L", "suspended_L", "rest_L")  # in what is saved


def test_a_state_of_before_layers_could_be_suspended_is_continued() -> None:
    one, other = planner(), planner()
    run(one, steady, range(4))
    state = {name: one.state()[name] for name in one.state() if name not in NEWER}
    other.restore(state)
    assert other.state()["planned_LRS"].tolist() == other.placement.slots_LRS.tolist() == state["slots_LRS"].tolist()
    assert not other.is_suspended(0)
    with pytest.raises(PlanError, match="credit_L of the saved plan"):
        other.restore({**one.state(), "credit_L": np.zeros(2)})
    with pytest.raises(PlanError, match="slots_LRS of the saved plan is missing"):
        other.restore({name: state[name] for name in state if name != "slots_LRS"})


@pytest.mark.parametrize("load", [steady, rotating])
def test_a_clear_case_is_judged_now_and_then(load: Callable[[int], IntArray]) -> None:
    one = planner()
    run(one, load, range(20))
    with mock.patch.object(replica_planner, "saved_by_exact", wraps=saved_by_exact) as judged:
        run(one, load, range(20, 60))
        assert 40 // 10 <= judged.call_count <= 1 + 40 // 6


def test_a_layer_whose_homes_move_begins_anew() -> None:
    one = planner()
    run(one, rotating, range(20))
    assert one.is_suspended(0)
    one.rehome(HOMES)
    assert one.is_suspended(0), "these are the same homes"
    moved_LRS = HOMES.slots_LRS.copy()
    moved_LRS[0, [0, 1], 0] = moved_LRS[0, [1, 0], 0]
    one.rehome(replace(HOMES, slots_LRS=moved_LRS))
    with mock.patch.object(replica_planner, "saved_by_exact", wraps=saved_by_exact) as judged:
        run(one, rotating, range(20, 21))
        assert not judged.called, "history has planned nothing for these homes"
        assert not one.is_suspended(0)
        run(one, rotating, range(21, 22))
        assert judged.called


def test_planning_ahead_leads_to_the_same() -> None:
    one, other = planner(), planner()
    for iteration in range(14):
        load = (rotating if iteration < 8 else steady)(iteration)[None, None]
        ahead = other.ahead(99, load)
        one.observe(load)
        other.adopt_history(ahead)
        assert lines([one.plan(iteration + 1)]) == lines([other.adopt_plan(ahead, iteration + 1)])
        assert all(np.array_equal(one.state()[name], array) for name, array in other.state().items())


def test_homes_move_and_the_mode_changes_while_a_layer_is_suspended() -> None:
    one = planner()
    run(one, rotating, range(12))
    moved_LRS = HOMES.slots_LRS.copy()
    moved_LRS[0, [0, 1], 0] = moved_LRS[0, [1, 0], 0]
    one.rehome(replace(HOMES, slots_LRS=moved_LRS))
    assert one.state()["planned_LRS"][:, :, :2].tolist() == moved_LRS[:, :, :2].tolist()
    assert replicas(one) == 0
    one.switch_to("history", HOMES)
    assert one.plan(13) is not None
    assert replicas(one) > 0
    assert not one.is_suspended(0)
