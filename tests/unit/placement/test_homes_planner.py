"""The planners of training: equal inputs give equal decisions everywhere, and the load is never worse for them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.decisions import MOST_CANDIDATES, digest_of
from megatron_smartmoe.placement.history import History
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.layer_cost import LayerPricing, PricedLayer
from megatron_smartmoe.placement.layer_plan import LayerPlan
from megatron_smartmoe.placement.online_options import OnlineOptions, ReplicaMode
from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.placement.review import MoveReview
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement
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
    homes.observe(counts_RE[None])
    if found := homes.propose(2, planner.placement):
        assert busiest(found[0].slots_LRS[0], counts_RE) <= busiest(planner.placement.slots_LRS[0], counts_RE)


def in_nanoseconds(slots_RS: IntArray, counts_RE: IntArray) -> float:
    return busiest(slots_RS, counts_RE) * 1e-9


def test_a_move_that_does_not_pay_is_logged_and_not_taken() -> None:
    first, second = synthetic_trace(SPEC).groups(8)[:2]
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8)
    options = OnlineOptions(state_bytes=10**12, policy=PolicyOptions(horizon_iterations=1))
    homes = HomesPlanner(2, 32, options, in_nanoseconds)
    homes.observe(first[:, 0, 0])
    homes.observe(second[:, 0, 0])
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
    first, second = synthetic_trace(SPEC).groups(8)[:2]
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8)
    price = PricedLayer(
        pricing=LayerPricing(num_ranks=8, constants=LayerConstants(token_s=1e-6, intra_token_s=1e-7, fixed_s=1e-5))
    )
    homes = HomesPlanner(2, 32, OnlineOptions(state_bytes=1000), price)
    homes.observe(first[:, 0, 0])
    homes.observe(second[:, 0, 0])
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
    homes = HomesPlanner(1, 8, OnlineOptions(), in_nanoseconds)
    for _ in range(2):
        homes.observe(np.ones((1, 4, 8), dtype=np.int64))
    assert homes.propose(2, start) is None


def of_one_source(*loads_E: list[int]) -> list[IntArray]:
    """Records of one layer on 2 ranks, whose tokens are all of rank 0."""
    return [np.array([[load_E, [0] * len(load_E)]]) for load_E in loads_E]


TWO_RANKS = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
HOT_01, HOT_03 = [40, 40, 10, 10], [40, 10, 10, 40]  # contiguous homes suit the second


@pytest.mark.parametrize("replicas", ["history", "exact"])
def test_homes_move_for_what_they_save_on_a_record_that_they_were_not_found_on(replicas: ReplicaMode) -> None:
    for loads, gain in (((HOT_01, HOT_01), 30), ((HOT_01, [40, 30, 10, 20]), 10), ((HOT_01, HOT_03), -30)):
        homes = HomesPlanner(1, 4, OnlineOptions(replicas=replicas), busiest)
        for counts_LRE in of_one_source(*loads):
            homes.observe(counts_LRE)
        found = homes.propose(2, TWO_RANKS)
        assert found is not None
        assert found[1].predicted_gain_s == gain
        assert found[1].taken == (gain > 0)


def test_with_auto_other_homes_save_nothing_where_plans_from_exact_counts_balance_as_well() -> None:
    """Replicas from history are too dear to be made here, those from exact counts cost nothing."""
    pricing = LayerPricing(num_ranks=2, num_nodes=2, constants=LayerConstants(token_s=1.0))
    start = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2, spare_slots=1)
    replica = ReplicaOptions(num_nodes=2, or_group=True, price=TransferPrice.of_each(1e6))
    options = OnlineOptions(homes=HomesOptions(num_nodes=2), replica=replica)
    for alone, gain_s in ((None, 30.0), (pricing, 0.0)):
        homes = HomesPlanner(1, 4, options, PricedLayer(pricing=pricing, alone=alone))
        for counts_LRE in of_one_source(HOT_01, HOT_01):
            homes.observe(counts_LRE)
        found = homes.propose(2, start)
        assert found is not None
        assert found[1].predicted_gain_s == pytest.approx(gain_s)
        assert found[1].taken == (gain_s > 0)


def test_a_gain_is_no_more_than_on_the_last_record_that_homes_were_found_on() -> None:
    homes = HomesPlanner(1, 4, OnlineOptions(), busiest)
    for counts_LRE in of_one_source([40, 30, 10, 20], HOT_01):
        homes.observe(counts_LRE)
    found = homes.propose(2, TWO_RANKS)
    assert found is not None
    assert found[1].predicted_gain_s == 70 - 50


def test_homes_are_found_on_what_came_before_the_last_record() -> None:
    counts = synthetic_trace(SPEC).groups(8)[:3, :, 0, 0]
    start = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=8)
    homes, earlier = HomesPlanner(2, 32, OnlineOptions(), busiest), History(2, 32)
    for counts_LRE in counts:
        homes.observe(counts_LRE)
    for counts_LRE in counts[:-1]:
        earlier.update(counts_LRE.sum(axis=1)[:, None])
    found = homes.propose(3, start)
    assert found is not None
    assert found[1].taken
    for layer, load_E in enumerate(earlier.forecast_LE()):
        wanted_RS = plan_homes(start.slots_LRS[layer], load_E, 4, HomesOptions()).slots_RS
        assert np.array_equal(found[0].slots_LRS[layer], wanted_RS)


@pytest.mark.parametrize("replicas", ["history", "exact"])
@pytest.mark.parametrize(("swap_s", "swaps"), [(4, 2), (6, 1), (16, 0)])
def test_homes_that_pay_follow_the_last_record_as_far_as_that_pays(
    replicas: ReplicaMode, swap_s: int, swaps: int
) -> None:
    """Found on the first record, a swap saves 30 on it and 20 on the last one, where a second swap saves 10 more."""
    start = Placement.contiguous(num_layers=1, num_experts=6, num_ranks=2)
    policy = PolicyOptions(horizon_iterations=1, margin=2.0)
    options = OnlineOptions(replicas=replicas, state_bytes=swap_s, migration_bytes_s=1.0, policy=policy)
    homes = HomesPlanner(1, 6, options, busiest)
    for counts_LRE in of_one_source([40, 40, 10, 10, 10, 10], [20, 40, 40, 0, 30, 10]):
        homes.observe(counts_LRE)
    found = homes.propose(2, start)
    assert found is not None
    proposal, decision = found
    assert decision.taken == (swaps > 0)
    assert decision.predicted_gain_s == 20  # as it was judged, whether or not it follows the last record
    assert decision.cost_s == swap_s * max(swaps, 1)
    assert busiest(proposal.slots_LRS[0], counts_LRE[0]) == (70 if swaps == 2 else 80)


def test_an_evaluation_takes_two_records_and_one_more_after_an_older_checkpoint() -> None:
    homes, resumed = (HomesPlanner(1, 4, OnlineOptions(), busiest) for _ in range(2))
    one, two, three = of_one_source(HOT_01, HOT_01, HOT_01)
    homes.observe(one)
    assert not homes.due(1)
    homes.observe(two)
    assert homes.due(2)
    older = {name: array for name, array in homes.state().items() if not name.startswith("earlier_")}
    resumed.restore(older, TWO_RANKS)
    assert not resumed.due(2)
    homes.observe(three)
    resumed.observe(three)
    decisions = [each.propose(3, TWO_RANKS) for each in (homes, resumed)]
    assert decisions[0] is not None
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize(("or_group", "gain_s"), [(False, 30.0), (True, 0.0)])
def test_a_review_gives_both_homes_the_replicas_that_may_be(or_group: bool, gain_s: float) -> None:
    """One rank a node: replicas even out the old homes too, but only where they may leave their nodes."""
    before = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2, spare_slots=1)
    after = replace(before, slots_LRS=np.array([[[0, 2, EMPTY], [1, 3, EMPTY]]]))
    review = MoveReview(before, after, gain_s, records=1)
    review.observe(of_one_source(HOT_01)[0])
    options = OnlineOptions(replica=ReplicaOptions(num_nodes=2, or_group=or_group))
    assert review.gain_s(busiest, options.exact_plan(options.replica.price)) == (gain_s, 50.0)


def test_before_anything_was_seen_nothing_is_planned() -> None:
    start = Placement.contiguous(num_layers=1, num_experts=32, num_ranks=4, spare_slots=1)
    assert ReplicaPlanner(start, 0, OnlineOptions()).plan(0) is None
    assert not HomesPlanner(1, 32, OnlineOptions(), busiest).due(0)


def test_digests_tell_numbers_apart_and_not_their_types() -> None:
    assert digest_of(np.array([1, 2])) == digest_of(np.array([1, 2], dtype=np.int32))  # type: ignore[arg-type]
    assert digest_of(np.array([1, 2])) != digest_of(np.array([2, 1]))
    assert digest_of(np.array([[1, 2]])) != digest_of(np.array([1, 2]))
