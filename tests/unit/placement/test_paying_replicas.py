"""Replicas that cost more time than they save are not made."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import without_losing_replicas
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import best_balance
from megatron_smartmoe.runtime.replicas.split import compiled_drop_losing
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of
from tests.unit.placement.cases import LEGS, contiguous_slots, random_counts


def cost(load_E: IntArray, slots_RS: IntArray, home_slots: int, price_tokens: float) -> float:
    """Tokens of the busiest rank, and the price of the transfers."""
    busiest = best_balance(hosts_of(slots_RS, len(load_E)), load_E).bound
    return busiest + price_tokens * relay_tree(slots_RS, home_slots).steps_by_link(1)[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(16, 8, 1), (32, 8, 2), (32, 16, 1)]), st.floats(0.01, 1.5))
def test_never_slower_than_all_replicas_or_none(seed: int, sizes: tuple[int, int, int], price: float) -> None:
    num_experts, num_ranks, spare = sizes
    load_E = random_counts(np.random.default_rng(seed), num_ranks, num_experts, sigma=1.2).sum(axis=0)
    bare_RS, home_slots = contiguous_slots(num_experts, num_ranks, spare), num_experts // num_ranks
    price_tokens = price * float(load_E.sum()) / num_ranks
    all_RS = exact_replicas(load_E, bare_RS, home_slots)
    paying_RS = without_losing_replicas(load_E[None], all_RS, home_slots, TransferPrice.of_each(price_tokens))
    assert ((paying_RS == all_RS) | (paying_RS == EMPTY)).all(), "replicas are dropped, never added"
    costs = [cost(load_E, slots_RS, home_slots, price_tokens) for slots_RS in (paying_RS, all_RS, bare_RS)]
    assert costs[0] <= min(costs[1:]) + 1e-6


def test_one_at_a_time_not_all_or_nothing() -> None:
    # one hot expert whose replicas save 40 tokens and one whose replica saves 3, at a price of 10 a transfer in a row
    load_E = np.array([110, 30, 30, 30])
    slots_RS = np.array([[0, EMPTY], [1, 0], [2, 0], [3, 0]])
    found_RS = without_losing_replicas(load_E[None], slots_RS, 1, TransferPrice.of_each(10.0))
    every = [
        np.where([[False, False], [False, a], [False, b], [False, c]], EMPTY, slots_RS)
        for a, b, c in itertools.product((False, True), repeat=3)
    ]
    assert cost(load_E, found_RS, 1, 10.0) == min(cost(load_E, one, 1, 10.0) for one in every)
    assert (found_RS[:, 1:] != EMPTY).sum() > 0


@pytest.mark.parametrize(("price_tokens", "replicas"), [(0.0, 3), (1e9, 0)])
def test_the_ends_of_the_price(price_tokens: float, replicas: int) -> None:
    load_E, slots_RS = np.array([400, 0, 0, 0]), np.array([[0, EMPTY], [1, 0], [2, 0], [3, 0]])
    found_RS = without_losing_replicas(load_E[None], slots_RS, 1, TransferPrice.of_each(price_tokens))
    assert (found_RS[:, 1:] != EMPTY).sum() == replicas


def test_several_loads_count_by_their_mean() -> None:
    slots_RS = np.array([[0, EMPTY], [1, 0]])
    often, seldom = np.array([200, 100]), np.array([100, 100])
    kept_RS = without_losing_replicas(np.stack([often, often, seldom]), slots_RS, 1, TransferPrice.of_each(30.0))
    assert (kept_RS == slots_RS).all(), "33 tokens on average"
    dropped_RS = without_losing_replicas(np.stack([often, seldom, seldom]), slots_RS, 1, TransferPrice.of_each(30.0))
    assert (dropped_RS[:, 1:] == EMPTY).all(), "17 tokens on average"


def test_what_is_hidden_of_all_transfers_is_free() -> None:
    # one replica, which saves 30 tokens
    load_E, slots_RS = np.array([130, 100, 100, 70]), np.array([[0, EMPTY], [1, EMPTY], [2, EMPTY], [3, 0]])
    price = TransferPrice.of_each(35.0)
    assert (without_losing_replicas(load_E[None], slots_RS, 1, price)[:, 1] == EMPTY).all()
    hidden = replace(price, fetch=replace(price.fetch, hidden_tokens=10.0))
    assert (without_losing_replicas(load_E[None], slots_RS, 1, hidden) == slots_RS).all(), "25 tokens are exposed"


def test_a_transfer_between_nodes_has_a_price_of_its_own() -> None:
    # 2 nodes of 2 ranks; rank 0 is too full: a replica on rank 1 is near, one on rank 3 is far
    load_E = np.array([200, 100, 100, 100])
    near_RS, far_RS = np.array([[0, -1], [1, 0], [2, -1], [3, -1]]), np.array([[0, -1], [1, -1], [2, -1], [3, 0]])
    price = TransferPrice(fetch=LegPrice(inside_tokens=10.0, between_tokens=60.0), num_nodes=2)
    assert (without_losing_replicas(load_E[None], near_RS, 1, price) == near_RS).all()
    assert (without_losing_replicas(load_E[None], far_RS, 1, price)[:, 1] == EMPTY).all()
    on_one_node = replace(price, num_nodes=1)
    assert (without_losing_replicas(load_E[None], far_RS, 1, on_one_node) == far_RS).all()


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(16, 8, 1), (32, 8, 2), (64, 16, 1), (24, 4, 2)]),
    st.builds(TransferPrice, fetch=LEGS, back=LEGS, num_nodes=st.sampled_from([1, 2, 4])),
    st.integers(1, 3),
)
def test_the_op_drops_the_same(seed: int, sizes: tuple[int, int, int], price: TransferPrice, num_loads: int) -> None:
    num_experts, num_ranks, spare = sizes
    rng = np.random.default_rng(seed)
    loads_KE = np.stack([random_counts(rng, num_ranks, num_experts).sum(axis=0) for _ in range(num_loads)])
    home_slots = num_experts // num_ranks
    slots_RS = exact_replicas(loads_KE[0], contiguous_slots(num_experts, num_ranks, spare), home_slots)
    found_RS = compiled_drop_losing(loads_KE, slots_RS, home_slots, price)
    assert (found_RS == without_losing_replicas(loads_KE, slots_RS, home_slots, price)).all()
