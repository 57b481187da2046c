"""Replicas that cost more time than they save are not made."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import paying_exact_replicas, without_losing_replicas
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import best_balance
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts


def cost(load_E: IntArray, slots_RS: IntArray, home_slots: int, price_tokens: float) -> float:
    """Tokens of the busiest rank, and the price of the transfers."""
    busiest = best_balance(hosts_of(slots_RS, len(load_E)), load_E).bound
    return busiest + price_tokens * relay_tree(slots_RS, home_slots).num_steps


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(16, 8, 1), (32, 8, 2), (32, 16, 1)]), st.floats(0.01, 1.5))
def test_never_slower_than_all_replicas_or_none(seed: int, sizes: tuple[int, int, int], price: float) -> None:
    num_experts, num_ranks, spare = sizes
    load_E = random_counts(np.random.default_rng(seed), num_ranks, num_experts, sigma=1.2).sum(axis=0)
    bare_RS, home_slots = contiguous_slots(num_experts, num_ranks, spare), num_experts // num_ranks
    price_tokens = price * float(load_E.sum()) / num_ranks
    all_RS = exact_replicas(load_E, bare_RS, home_slots)
    paying_RS = without_losing_replicas(load_E[None], all_RS, home_slots, price_tokens)
    assert ((paying_RS == all_RS) | (paying_RS == EMPTY)).all(), "replicas are dropped, never added"
    costs = [cost(load_E, slots_RS, home_slots, price_tokens) for slots_RS in (paying_RS, all_RS, bare_RS)]
    assert costs[0] <= min(costs[1:]) + 1e-6


def test_one_at_a_time_not_all_or_nothing() -> None:
    # one hot expert whose replicas save 40 tokens and one whose replica saves 3, at a price of 10 a transfer in a row
    load_E = np.array([110, 30, 30, 30])
    slots_RS = np.array([[0, EMPTY], [1, 0], [2, 0], [3, 0]])
    found_RS = without_losing_replicas(load_E[None], slots_RS, 1, 10.0)
    every = [
        np.where([[False, False], [False, a], [False, b], [False, c]], EMPTY, slots_RS)
        for a, b, c in itertools.product((False, True), repeat=3)
    ]
    assert cost(load_E, found_RS, 1, 10.0) == min(cost(load_E, one, 1, 10.0) for one in every)
    assert (found_RS[:, 1:] != EMPTY).sum() > 0


@pytest.mark.parametrize(("price_tokens", "replicas"), [(0.0, 3), (1e9, 0)])
def test_the_ends_of_the_price(price_tokens: float, replicas: int) -> None:
    load_E, slots_RS = np.array([400, 0, 0, 0]), np.array([[0, EMPTY], [1, 0], [2, 0], [3, 0]])
    found_RS = without_losing_replicas(load_E[None], slots_RS, 1, price_tokens)
    assert (found_RS[:, 1:] != EMPTY).sum() == replicas


def test_several_loads_count_by_their_mean() -> None:
    slots_RS = np.array([[0, EMPTY], [1, 0]])
    often, seldom = np.array([200, 100]), np.array([100, 100])
    kept_RS = without_losing_replicas(np.stack([often, often, seldom]), slots_RS, 1, 30.0)
    assert (kept_RS == slots_RS).all(), "33 tokens on average"
    dropped_RS = without_losing_replicas(np.stack([often, seldom, seldom]), slots_RS, 1, 30.0)
    assert (dropped_RS[:, 1:] == EMPTY).all(), "17 tokens on average"


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(16, 8, 1), (32, 8, 2), (64, 16, 1), (24, 4, 2)]),
    st.floats(0, 1),
    st.integers(1, 3),
)
def test_the_op_drops_the_same(seed: int, sizes: tuple[int, int, int], price: float, num_loads: int) -> None:
    num_experts, num_ranks, spare = sizes
    rng = np.random.default_rng(seed)
    loads_KE = np.stack([random_counts(rng, num_ranks, num_experts).sum(axis=0) for _ in range(num_loads)])
    home_slots = num_experts // num_ranks
    slots_RS = exact_replicas(loads_KE[0], contiguous_slots(num_experts, num_ranks, spare), home_slots)
    price_tokens = price * float(loads_KE[0].sum()) / num_ranks
    found = ops.paying_replicas(torch.from_numpy(loads_KE), torch.from_numpy(slots_RS), home_slots, price_tokens)
    assert (found.numpy() == without_losing_replicas(loads_KE, slots_RS, home_slots, price_tokens)).all()


def test_no_replicas_for_homes_that_are_balanced() -> None:
    bare_RS = contiguous_slots(4, 4, 1)
    found_RS = paying_exact_replicas(np.array([102, 100, 100, 98]), bare_RS, 1, 1, 0.0, 1.03)
    assert (found_RS == bare_RS).all()
