"""Cuts and local search: the exact makespan, moves that do what they were judged for, fixed homes, nodes, prices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.placement.search.cuts import MEAN_LOAD, CutPool, scaled
from megatron_smartmoe.placement.search.improve import _judge, _View, improve
from megatron_smartmoe.placement.search.moves import Moves, Table, clearings, exchanges, home_swaps, replacements
from megatron_smartmoe.placement.search.objective import Objective, Space
from megatron_smartmoe.placement.split import min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts, random_slots


def one_node(num_ranks: int) -> IntArray:
    return np.zeros(num_ranks, dtype=np.int64)


def true_imbalance(slots_RS: IntArray, load_E: IntArray | FloatArray) -> float:
    """From the split itself, which the search does not use."""
    num_ranks = len(slots_RS)
    load_E = scaled(load_E[None], num_ranks)[0].astype(np.int64)
    counts_RE = np.zeros((num_ranks, len(load_E)), np.int64)
    counts_RE[0] = load_E
    load_R = min_max_split(counts_RE, hosts_of(slots_RS, len(load_E))).sum(axis=0)
    return float(load_R.max() / load_R.mean())


@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.sampled_from([4, 8, 16]))
@settings(max_examples=30)
def test_cuts_give_the_makespan_of_the_exact_split(seed: int, num_ranks: int) -> None:
    rng = np.random.default_rng(seed)
    slots_RS = random_slots(rng, 32, num_ranks, 2)
    loads_KE = scaled(np.stack([rng.lognormal(0, 1.5, 32) for _ in range(3)]), num_ranks)
    pool = CutPool(num_ranks)
    view = _View(slots_RS, loads_KE, pool, Objective())
    view.ask_oracle()
    view.evaluate()
    for load_E, locked_Q in zip(loads_KE, view.locked_KQ, strict=True):
        found = max(1.0, (locked_Q / pool.size_Q).max() / MEAN_LOAD)
        assert found == pytest.approx(true_imbalance(slots_RS, load_E), rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_move_does_what_it_was_judged_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots_RS = random_slots(rng, 16, 4, 2)
    hosts_ER, all_E = hosts_of(slots_RS, 16), np.arange(16)
    loads_KE = scaled(np.stack([rng.lognormal(0, 1.5, 16) for _ in range(2)]), 4)
    space, objective = Space(home_slots=4, node_R=np.array([0, 0, 1, 1]), move_homes=True), Objective()
    view = _View(slots_RS, loads_KE, CutPool(4), objective)
    table = Table(slots_RS=slots_RS, hosts_ER=hosts_ER, start_ER=hosts_ER, space=space, objective=objective)
    kinds = [
        clearings(table),
        replacements(table, all_E, np.arange(8)),
        exchanges(table, all_E, np.arange(8)),
        home_swaps(table, all_E),
    ]
    for moves in kinds:
        judged_M = _judge(moves, view)
        for move in rng.permutation(len(moves))[:10]:
            after_RS = moves.applied(int(move), slots_RS)
            assert _View(after_RS, loads_KE, view.pool, objective).excess == pytest.approx(judged_M[move], abs=1e-12)
            Placement(slots_LRS=after_RS[None], num_experts=16)


def test_moves_never_leave_the_node_of_a_home() -> None:
    rng = np.random.default_rng(1)
    slots_RS = contiguous_slots(16, 4, 2)
    space = Space(home_slots=4, node_R=np.array([0, 0, 1, 1]))
    found = improve(slots_RS, rng.lognormal(0, 1.5, (2, 16)), Objective(), space).slots_RS
    for rank, slot in np.argwhere(found[:, 4:] != EMPTY):
        home_rank = np.argwhere(found[:, :4] == found[rank, slot + 4])[0][0]
        assert home_rank // 2 == rank // 2


def test_homes_stay_where_they_are_unless_they_may_move() -> None:
    rng = np.random.default_rng(2)
    slots_RS, loads_KE = contiguous_slots(32, 8, 1), rng.lognormal(0, 1.5, (3, 32))
    space = Space(home_slots=4, node_R=one_node(8))
    fixed = improve(slots_RS, loads_KE, Objective(), space)
    assert np.array_equal(fixed.slots_RS[:, :4], slots_RS[:, :4])
    assert (fixed.slots_RS[:, 4] != EMPTY).any()


def test_homes_that_may_move_balance_ranks_without_spare_slots() -> None:
    load_E = np.array([8.0, 8, 1, 1, 1, 1, 1, 1])  # both heavy experts on rank 0
    space = Space(home_slots=2, node_R=one_node(4), move_homes=True)
    found = improve(contiguous_slots(8, 4, 0), load_E[None], Objective(), space)
    assert found.imbalance_K[0] == pytest.approx(9 / 5.5)
    assert found.steps == 1


def test_a_placement_that_is_good_is_left_alone() -> None:
    rng = np.random.default_rng(3)
    loads_KE = random_counts(rng, 4, 32, sigma=1.0).astype(float)
    space = Space(home_slots=4, node_R=one_node(8))
    first = improve(contiguous_slots(32, 8, 1), loads_KE, Objective(), space)
    again = improve(first.slots_RS, loads_KE, Objective(), space)
    assert again.steps == 0
    assert np.array_equal(again.slots_RS, first.slots_RS)


def test_never_worse_than_the_start() -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        slots_RS, loads_KE = random_slots(rng, 32, 16, 1), rng.lognormal(0, 1, (3, 32))
        space = Space(home_slots=2, node_R=one_node(16))
        before = improve(slots_RS, loads_KE, Objective(), Space(home_slots=2, node_R=one_node(16), max_steps=0))
        assert improve(slots_RS, loads_KE, Objective(), space).excess <= before.excess


def test_a_copy_that_costs_more_than_it_wins_is_cleared() -> None:
    slots_RS = contiguous_slots(8, 4, 1)
    slots_RS[1, 2] = 0
    even = np.ones((1, 8))
    space = Space(home_slots=2, node_R=one_node(4))
    assert (improve(slots_RS, even, Objective(), space).slots_RS == slots_RS).all()
    assert (improve(slots_RS, even, Objective(replica_price=1e-3), space).slots_RS[:, 2] == EMPTY).all()


def test_the_result_does_not_depend_on_the_scale_of_the_loads() -> None:
    rng = np.random.default_rng(5)
    loads_KE = rng.integers(1, 1000, (3, 32))
    space = Space(home_slots=4, node_R=one_node(8))
    one = improve(contiguous_slots(32, 8, 1), loads_KE, Objective(), space)
    other = improve(contiguous_slots(32, 8, 1), loads_KE * 64, Objective(), space)
    assert np.array_equal(one.slots_RS, other.slots_RS)


def test_an_exchange_of_homes_takes_the_replica_that_was_waiting() -> None:
    slots_RS = np.array([[0, 1, EMPTY], [2, 3, 0]])
    moves = Moves(
        at_M2=np.array([[0, 3]]),
        new_M=np.array([-2]),
        expert_M2=np.array([[0, 2]]),
        from_M2=np.array([[0, 1]]),
        to_M2=np.array([[-1, 0]]),
        price_M=np.zeros(1),
        home_slots=2,
    )
    assert moves.applied(0, slots_RS).tolist() == [[2, 1, EMPTY], [0, 3, EMPTY]]
