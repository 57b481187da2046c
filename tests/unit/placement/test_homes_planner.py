"""The planners of training: equal inputs give equal decisions everywhere, and the load is never worse for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.placement.decisions import MOST_CANDIDATES, digest_of
from megatron_smartmoe.placement.homes_planner import HomesPlanner, OnlineOptions
from megatron_smartmoe.placement.layer_cost import LayerPricing, layer_seconds
from megatron_smartmoe.placement.layer_plan import LayerPlan
from megatron_smartmoe.placement.plan_homes import HomesOptions
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement
from tests.support.synthetic import SyntheticSpec, synthetic_trace
from tests.unit.placement.cases import rank_loads

SPEC = SyntheticSpec(kind="drifting", num_records=6, num_layers=2, num_sources=8, skew=1.3, seed=7)


def busiest(slots_RS: IntArray, counts_RE: IntArray) -> float:
    return float(rank_loads(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE).max())


def decisions_of_a_run(spare_slots: int = 1, resumed_at: int | None = None) -> list[str]:
    """Every decision's line of a short run, in order; at one iteration planners may be made anew, from their state."""
    counts = synthetic_trace(SPEC).groups(8)
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8, spare_slots=spare_slots)
    options = OnlineOptions(homes_interval=2, review_records=2)
    homes, planner = HomesPlanner(2, 32, options, busiest), ReplicaPlanner(start, 0, options)
    lines = []
    for iteration, counts_LGMRE in enumerate(counts):
        if iteration == resumed_at:
            states, present = (homes.state(), planner.state()), planner.placement
            homes, planner = HomesPlanner(2, 32, options, busiest), ReplicaPlanner(start, 0, options)
            homes.restore({name: array.copy() for name, array in states[0].items()}, present)
            planner.restore({name: array.copy() for name, array in states[1].items()})
            assert planner.placement == present
        if found := homes.review(iteration, planner.placement):
            planner.placement = found[0]
            lines.append(found[1].to_line())
        if homes.due(iteration) and (found := homes.propose(iteration, planner.placement)):
            proposal, decision = found
            planner.placement = proposal if decision.taken else planner.placement
            lines.append(decision.to_line())
        if replicas := planner.plan(iteration):
            lines.append(replicas.to_line())
        planner.observe(counts_LGMRE[:, 0].sum(axis=2))
        homes.observe(counts_LGMRE[:, 0, 0])
    return lines


def test_decisions_are_equal_across_runs() -> None:
    """Across processes: tests/dist/test_processes.py."""
    assert decisions_of_a_run() == decisions_of_a_run() != []


@pytest.mark.parametrize("iteration", range(1, 6))
def test_planners_that_are_made_anew_from_their_state_decide_the_same(iteration: int) -> None:
    """A move is under review at some of these iterations."""
    assert decisions_of_a_run(resumed_at=iteration) == decisions_of_a_run()


def test_homes_move_without_spare_slots_and_the_log_says_what_and_why() -> None:
    lines = decisions_of_a_run(spare_slots=0)
    assert all('"kind": "homes"' in line or '"kind": "review"' in line for line in lines)
    assert any('"taken": true' in line and "pays: " in line for line in lines)


@given(seed=st.integers(0, 2**32 - 1), spare=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_never_worse_than_the_present_placement_on_what_was_seen(seed: int, spare: int) -> None:
    trace = synthetic_trace(SyntheticSpec(kind="lognormal", num_records=1, num_layers=1, num_sources=4, seed=seed))
    counts_RE = trace.groups(4)[0, 0, 0, 0]
    start = Placement.contiguous(num_layers=1, num_experts=32, num_ranks=4, spare_slots=spare)
    options = OnlineOptions(homes=HomesOptions(swap_price=0.0))
    planner = ReplicaPlanner(start, 0, options)
    planner.observe(counts_RE.sum(axis=0)[None, None])
    planner.plan(1)
    assert busiest(planner.placement.slots_LRS[0], counts_RE) <= busiest(start.slots_LRS[0], counts_RE)
    homes = HomesPlanner(1, 32, options, busiest)
    homes.observe(counts_RE[None])
    if found := homes.propose(1, planner.placement):
        assert busiest(found[0].slots_LRS[0], counts_RE) <= busiest(planner.placement.slots_LRS[0], counts_RE)


def test_a_move_that_does_not_pay_is_logged_and_not_taken() -> None:
    counts_LGMRE = synthetic_trace(SPEC).groups(8)[0]
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8)
    options = OnlineOptions(state_bytes=10**12, policy=PolicyOptions(horizon_iterations=1))
    homes = HomesPlanner(2, 32, options, lambda slots_RS, counts_RE: busiest(slots_RS, counts_RE) * 1e-9)
    homes.observe(counts_LGMRE[:, 0, 0])
    found = homes.propose(1, start)
    assert found is not None
    proposal, decision = found
    assert proposal != start
    assert not decision.taken
    assert decision.why.startswith("does not pay: ")
    assert decision.moved_bytes == 0
    assert decision.changes
    assert not homes.due(50)
    assert homes.due(101)


def test_a_decision_has_its_candidates_and_their_parts_add_up() -> None:
    counts_LGMRE = synthetic_trace(SPEC).groups(8)[0]
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8)
    price = layer_seconds(
        LayerPricing(num_ranks=8, constants=LayerConstants(token_s=1e-6, intra_token_s=1e-7, fixed_s=1e-5))
    )
    homes = HomesPlanner(2, 32, OnlineOptions(state_bytes=1000), price)
    homes.observe(counts_LGMRE[:, 0, 0])
    found = homes.propose(1, start)
    assert found is not None
    decision = found[1]
    chosen = [one for one in decision.candidates if one.chosen]
    assert 0 < len(decision.candidates) <= MOST_CANDIDATES
    assert sum(one.gain_s or 0.0 for one in chosen) == pytest.approx(decision.predicted_gain_s)
    for one in decision.candidates:
        assert (one.compute_s or 0.0) + (one.traffic_s or 0.0) + (one.replicas_s or 0.0) == pytest.approx(one.gain_s)
    assert {one.layer for one in decision.forecast} <= {one.layer for one in chosen}
    hottest = [share for _, share in decision.forecast[0].hottest]
    assert hottest == sorted(hottest, reverse=True)
    assert len(decision.to_line()) < 6000


def test_homes_that_cannot_be_better_give_no_decision() -> None:
    start = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=4)
    homes = HomesPlanner(1, 8, OnlineOptions(), lambda slots_RS, counts_RE: busiest(slots_RS, counts_RE) * 1e-9)
    homes.observe(np.ones((1, 4, 8), dtype=np.int64))
    assert homes.propose(1, start) is None


def test_before_anything_was_seen_nothing_is_planned() -> None:
    start = Placement.contiguous(num_layers=1, num_experts=32, num_ranks=4, spare_slots=1)
    assert ReplicaPlanner(start, 0, OnlineOptions()).plan(0) is None
    assert not HomesPlanner(1, 32, OnlineOptions(), busiest).due(0)


def test_digests_tell_numbers_apart_and_not_their_types() -> None:
    assert digest_of(np.array([1, 2])) == digest_of(np.array([1, 2], dtype=np.int32))  # type: ignore[arg-type]
    assert digest_of(np.array([1, 2])) != digest_of(np.array([2, 1]))
    assert digest_of(np.array([[1, 2]])) != digest_of(np.array([1, 2]))
