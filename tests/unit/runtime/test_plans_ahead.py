"""Plans made on a thread are those that would have been made in the step, whatever happens until they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.runtime.replicas.ahead import PlansAhead
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

HOMES = Placement.contiguous(num_layers=3, num_experts=8, num_ranks=4, spare_slots=1)


def counts(seed: int, micro_batches: int = 2) -> IntArray:
    return np.random.default_rng(seed).integers(1, 500, (3, micro_batches, 8)) ** 2


def planner() -> ReplicaPlanner:
    return ReplicaPlanner(HOMES, 0, OnlineOptions(), layer_numbers=[4, 6, 8])


def state_of(planner: ReplicaPlanner) -> dict[str, list[Any]]:
    return {name: array.tolist() for name, array in planner.state().items()}


def in_the_step(seeds: range) -> tuple[ReplicaPlanner, list[str]]:
    """A planner that observes and plans without a thread, and the decisions."""
    planned, lines = planner(), []
    for iteration in seeds:
        planned.observe(counts(iteration))
        decision = planned.plan(iteration + 1)
        lines.append("" if decision is None else decision.to_line())
    return planned, lines


def test_the_thread_plans_what_the_step_would() -> None:
    expected, lines = in_the_step(range(6))
    ahead, found = PlansAhead(planner()), []
    for iteration in range(6):
        ahead.start(99, lambda iteration=iteration: counts(iteration))  # type: ignore[misc]
        if iteration % 2:
            ahead.observe()  # as a save does
        decision = ahead.plan(iteration + 1)
        found.append("" if decision is None else decision.to_line())
    assert found == lines
    assert any(lines)
    assert state_of(ahead.planner) == state_of(expected)


def test_a_plan_that_is_not_ready_is_waited_for() -> None:
    expected, _ = in_the_step(range(1))
    ahead, may_go = PlansAhead(planner()), threading.Event()

    def slow() -> IntArray:
        assert may_go.wait(10)
        return counts(0)

    ahead.start(1, slow)
    assert ahead.planner.placement == HOMES
    threading.Timer(0.05, may_go.set).start()
    ahead.plan(1)
    assert ahead.planner.placement == expected.placement != HOMES


def test_a_save_in_between_has_the_new_history_and_the_present_replicas() -> None:
    expected, _ = in_the_step(range(2))
    expected.observe(counts(2))
    ahead = PlansAhead(in_the_step(range(2))[0])
    ahead.start(3, lambda: counts(2))
    ahead.observe()
    assert state_of(ahead.planner) == state_of(expected)
    expected.plan(3)
    ahead.plan(3)
    assert state_of(ahead.planner) == state_of(expected)


def test_counts_of_an_iteration_that_was_run_again_are_dropped() -> None:
    expected, _ = in_the_step(range(1))
    ahead = PlansAhead(planner())
    ahead.start(1, lambda: counts(7))
    ahead.start(1, lambda: counts(0))
    ahead.plan(1)
    assert state_of(ahead.planner) == state_of(expected)
    ahead.start(2, lambda: counts(8))
    ahead.discard()
    assert ahead.plan(2) == expected.plan(2)
    assert state_of(ahead.planner) == state_of(expected)


def test_homes_that_moved_are_planned_for() -> None:
    moved = HOMES.slots_LRS.copy()
    moved[:, [0, 1], 0] = moved[:, [1, 0], 0]
    expected, ahead = planner(), PlansAhead(planner())
    ahead.start(1, lambda: counts(0))
    expected.observe(counts(0))
    ahead.observe()
    for one in (expected, ahead.planner):
        one.rehome(replace(HOMES, slots_LRS=moved))
    decisions = expected.plan(1), ahead.plan(1)
    assert decisions[0] is not None
    assert decisions[0] == decisions[1]
    assert state_of(ahead.planner) == state_of(expected)


def failing(layer: int) -> Callable[..., Any]:
    scenarios = History.scenarios_KE

    def fail(history: History, at: int) -> Any:
        if at == layer:
            raise FloatingPointError("what went wrong")
        return scenarios(history, at)

    return fail


def test_an_error_on_the_thread_is_raised_in_the_step_with_its_layer() -> None:
    expected, _ = in_the_step(range(1))
    ahead = PlansAhead(planner())
    with mock.patch.object(History, "scenarios_KE", failing(1)):
        ahead.start(1, lambda: counts(0))
        ahead.observe()
        with pytest.raises(PlanError, match=r"^layer 6 cannot be planned: FloatingPointError: what went wrong$"):
            ahead.plan(1)
    assert ahead.planner.placement is HOMES
    ahead.plan(1)  # the history is whole, so the next plan is as good as ever
    assert state_of(ahead.planner) == state_of(expected)
