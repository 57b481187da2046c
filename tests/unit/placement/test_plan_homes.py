"""Homes move little and for a reason; the policy says yes, no and why."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.policy import Policy, PolicyOptions
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.placement import EMPTY, Placement
from tests.unit.placement.cases import contiguous_slots


def test_one_swap_separates_two_heavy_experts() -> None:
    plan = plan_homes(contiguous_slots(8, 4, 0), np.array([8.0, 8, 1, 1, 1, 1, 1, 1]), 2)
    assert len(plan.swaps) == 1
    assert np.array([8.0, 8, 1, 1, 1, 1, 1, 1])[plan.slots_RS].sum(axis=1).tolist() == [9, 9, 2, 2]
    Placement(slots_LRS=plan.slots_RS[None], num_experts=8)


def test_a_swap_that_wins_less_than_its_price_is_not_made() -> None:
    load_E = np.array([1.1, 1, 1, 1, 1, 1, 1, 0.9])
    assert plan_homes(contiguous_slots(8, 4, 0), load_E, 2, HomesOptions(swap_price=0.1)).swaps == ()
    assert len(plan_homes(contiguous_slots(8, 4, 0), load_E, 2, HomesOptions(swap_price=0.01)).swaps) == 1


def test_hot_experts_land_on_different_ranks_of_a_node() -> None:
    """2 nodes of 4 ranks: two of four hot experts go to the other node, and no two of them to one rank."""
    load_E = np.array([9.0, 9, 9, 9, *[1] * 12])
    options = HomesOptions(num_nodes=2, node_swap_price=1e-4)
    homes_RH = plan_homes(contiguous_slots(16, 8, 1), load_E, 2, options).slots_RS[:, :2]
    hot_R = (homes_RH < 4).sum(axis=1)
    assert hot_R.reshape(2, 4).sum(axis=1).tolist() == [2, 2]
    assert hot_R[4:].max() == 1


def test_a_swap_between_nodes_is_dearer() -> None:
    load_E = np.array([4.0, 4, 1, 1, 1, 1, 1, 1])
    options = HomesOptions(num_nodes=2)
    first, second = plan_homes(contiguous_slots(8, 4, 0), load_E, 2, options).swaps[0]
    assert first in (0, 1)
    assert second in (2, 3)  # ranks 0 and 1 share the node


def test_with_spare_slots_only_nodes_are_balanced() -> None:
    heavy_rank = np.array([8.0, 8, 1, 1, 1, 1, 8, 8])
    assert plan_homes(contiguous_slots(8, 4, 1), heavy_rank, 2, HomesOptions(num_nodes=2)).swaps == ()
    heavy_node = np.array([8.0, 8, 8, 8, 1, 1, 1, 1])
    plan = plan_homes(contiguous_slots(8, 4, 1), heavy_node, 2, HomesOptions(num_nodes=2))
    assert heavy_node[plan.slots_RS[:, :2]].reshape(2, -1).sum(axis=1).tolist() == [18, 18]
    assert len(plan.swaps) == 2
    free = HomesOptions(num_nodes=2, replica_scope_is_node=False)
    assert plan_homes(contiguous_slots(8, 4, 1), heavy_node, 2, free).swaps == ()


def test_replicas_that_lose_their_node_are_cleared() -> None:
    slots_RS = contiguous_slots(8, 4, 1)
    slots_RS[1, 2], slots_RS[3, 2] = 0, 6  # expert 0 on ranks 0 and 1, expert 6 at home on rank 3: not its replica
    slots_RS[3, 2] = EMPTY
    plan = plan_homes(slots_RS, np.array([8.0, 8, 8, 8, 1, 1, 1, 1]), 2, HomesOptions(num_nodes=2))
    moved = {expert for swap in plan.swaps for expert in swap}
    assert (plan.slots_RS[1, 2] == EMPTY) == (0 in moved)
    Placement(slots_LRS=plan.slots_RS[None], num_experts=8)


def test_the_policy_weighs_gain_over_the_horizon_against_cost() -> None:
    policy = Policy(PolicyOptions(horizon_iterations=100, margin=2.0, cooldown_iterations=50))
    verdict = policy.judge(10, gain_s=0.010, cost_s=0.6)
    assert not verdict.take
    assert verdict.why == ("does not pay: 10.000 ms x 100 iterations = 1.000 s, cost 0.600 s x margin 2 = 1.200 s")
    assert policy.judge(10, gain_s=0.010, cost_s=0.4).take
    assert policy.judge(10, gain_s=0.0, cost_s=0.0).why.startswith("no gain")


def test_a_move_has_a_cooldown_and_losses_a_longer_one() -> None:
    policy = Policy(PolicyOptions(cooldown_iterations=50, max_cooldown_iterations=150))
    assert policy.judge(0, gain_s=1.0, cost_s=0.0).take
    assert policy.judge(49, gain_s=1.0, cost_s=0.0).why.startswith("cooldown 49/50 iterations; ")
    assert policy.judge(50, gain_s=1.0, cost_s=0.0).take
    lost = policy.realised(iteration_s=1.0, gain_s=-0.2)
    assert not lost.take
    assert lost.why == "found -200.000 ms/iter on the loads since: reverted, next attempt in 100 iterations"
    assert "(1 losing move)" in policy.judge(149, gain_s=1.0, cost_s=0.0).why
    policy.realised(iteration_s=1.0, gain_s=-0.2)
    assert policy.cooldown_iterations == 150
    assert "cooldown 149/150 iterations (2 losing moves in a row); " in policy.judge(199, gain_s=1.0, cost_s=0.0).why
    assert policy.judge(200, gain_s=1.0, cost_s=0.0).take
    assert policy.realised(iteration_s=1.0, gain_s=0.005).take
    assert policy.cooldown_iterations == 50


def test_after_a_loss_a_gain_that_dwarfs_its_error_need_not_wait() -> None:
    """Losing moves were wrong by 0.3 s an iteration, then by 0.7."""
    policy = Policy(PolicyOptions(margin=2.0, cooldown_iterations=50))
    assert policy.judge(0, gain_s=0.1, cost_s=0.0).take
    assert policy.judge(10, gain_s=9.0, cost_s=0.0).why.startswith("cooldown 10/50")  # nothing has lost yet
    policy.realised(iteration_s=1.0, gain_s=-0.2, iteration=10, predicted_s=0.1)
    assert policy.judge(11, gain_s=0.6, cost_s=0.0).why.startswith("cooldown 1/100 iterations (1 losing move); ")
    waived = policy.judge(12, gain_s=0.61, cost_s=0.0)
    assert waived.take
    assert waived.why.endswith("; no cooldown: 1 losing move promised at most 300.000 ms too much")
    assert policy.judge(12, gain_s=0.61, cost_s=1e6).why.startswith("does not pay: ")
    policy.realised(iteration_s=1.0, gain_s=-0.09, iteration=20, predicted_s=0.61)
    assert not policy.judge(21, gain_s=1.4, cost_s=0.0).take
    assert policy.judge(22, gain_s=1.41, cost_s=0.0).take
    policy.realised(iteration_s=1.0, gain_s=0.5, iteration=30, predicted_s=1.41)
    assert policy.wrong_s == 0.0


def test_a_loss_is_reverted_only_where_reverting_pays() -> None:
    policy = Policy(PolicyOptions(horizon_iterations=100, margin=2.0, cooldown_iterations=50))
    kept = policy.realised(iteration_s=1.0, gain_s=-0.01, cost_s=0.6)
    assert kept.take
    assert (
        kept.why == "found -10.000 ms/iter on the loads since: kept, reverting does not pay (1.000 s against 1.200 s)"
    )
    assert policy.cooldown_iterations == 100  # it was a loss all the same
    assert not policy.realised(iteration_s=1.0, gain_s=-0.01, cost_s=0.4).take


def test_the_cooldown_begins_when_a_loss_is_reverted() -> None:
    policy = Policy(PolicyOptions(cooldown_iterations=50))
    assert policy.judge(0, gain_s=1.0, cost_s=0.0).take
    assert not policy.realised(iteration_s=1.0, gain_s=-0.2, iteration=50).take
    refused = policy.judge(100, gain_s=1.0, cost_s=0.0)
    assert not refused.take
    assert refused.why.startswith("cooldown 50/100 iterations (1 losing move); ")
    assert policy.judge(150, gain_s=1.0, cost_s=0.0).take


def test_what_a_stopwatch_cannot_tell_from_nothing_is_no_loss() -> None:
    policy = Policy(PolicyOptions(cooldown_iterations=50, tolerance=0.01))
    assert policy.realised(iteration_s=1.0, gain_s=-0.009).take
    assert policy.losses == 0
    assert not policy.realised(iteration_s=1.0, gain_s=-0.011).take


def first_swap_of_all(load_RH: FloatArray, price: float) -> tuple[int, int] | None:
    """The pair of flat home slots with the largest gain, the first of several, each pair judged on its own."""
    busiest = int(load_RH.sum(axis=1).argmax())
    home_slots = load_RH.shape[1]
    before, best, found = worth(load_RH.sum(axis=1)), 0.0, None
    for first in range(busiest * home_slots, (busiest + 1) * home_slots):
        for second in range(load_RH.size):
            after_RH = load_RH.copy()
            after_RH.flat[[first, second]] = load_RH.flat[[second, first]]
            gain = round((before - worth(after_RH.sum(axis=1)) - price) * 1e9)
            if second // home_slots != busiest and gain > best:
                best, found = gain, (first, second)
    return found


def worth(load_R: FloatArray) -> float:
    over_R = np.maximum(load_R - 1.0, 0.0)
    return float(over_R.max() + 0.1 * over_R.sum())


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 8]), st.integers(1, 5), st.sampled_from([0.0, 0.05, 0.3]))
@settings(deadline=None, max_examples=60)
def test_it_is_the_best_of_all_swaps(seed: int, num_ranks: int, home_slots: int, price: float) -> None:
    load_E = 0.25 + 0.25 * np.random.default_rng(seed).integers(0, 5, num_ranks * home_slots).astype(np.float64)
    slots_RS = contiguous_slots(num_ranks * home_slots, num_ranks, 0)
    plan = plan_homes(slots_RS, load_E, home_slots, HomesOptions(swap_price=price, max_swaps=1))
    expected = first_swap_of_all((load_E * (num_ranks / load_E.sum())).reshape(num_ranks, -1), price)
    assert [*plan.swaps] == ([] if expected is None else [expected])
