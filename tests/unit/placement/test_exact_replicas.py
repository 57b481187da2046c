"""Replicas from the exact load: balanced, within the slots, within the node, a replica finishes a rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.split import min_max_split
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts


def imbalance(counts_RE: IntArray, slots_RS: IntArray) -> float:
    load_R = min_max_split(counts_RE, hosts_of(slots_RS, counts_RE.shape[1])).sum(axis=0)
    return float(load_R.max() / load_R.mean())


def test_a_worked_example() -> None:
    """Loads 10 + 2, 1 + 1, 3 + 3 on three ranks: T = 7 (20 / 3 up). Rank 0 fills rank 1 with 5 tokens of expert 0."""
    slots_RS = contiguous_slots(6, 3, 1)
    found = exact_replicas(np.array([10, 2, 1, 1, 3, 3]), slots_RS, 2)
    assert found.tolist() == [[0, 1, EMPTY], [2, 3, 0], [4, 5, EMPTY]]


def test_a_donor_gives_more_than_its_surplus_and_receives_in_turn() -> None:
    """Loads 9, 8, 1: T = 6. No surplus (3, 2) fills the gap of 5, so rank 1 gives 5 of 8 and takes 3 from rank 0."""
    found = exact_replicas(np.array([9, 8, 1]), contiguous_slots(3, 3, 1), 1)
    assert found.tolist() == [[0, EMPTY], [1, 0], [2, 1]] or found.tolist() == [[0, 1], [1, EMPTY], [2, 0]]
    assert imbalance(np.array([[9, 8, 1], [0, 0, 0], [0, 0, 0]]), found) == 1.0


@given(seed=st.integers(0, 2**32 - 1), spare=st.integers(0, 3), num_nodes=st.sampled_from([1, 2]))
@settings(max_examples=60)
def test_always_a_valid_placement_never_worse_than_homes_alone(seed: int, spare: int, num_nodes: int) -> None:
    rng = np.random.default_rng(seed)
    counts_RE = random_counts(rng, 8, 32, sigma=rng.uniform(0, 2.5), tokens=int(rng.integers(1, 4000)))
    slots_RS = contiguous_slots(32, 8, spare)
    found = exact_replicas(counts_RE.sum(axis=0), slots_RS, 4, num_nodes)
    Placement(slots_LRS=found[None], num_experts=32)
    assert np.array_equal(found[:, :4], slots_RS[:, :4])
    assert imbalance(counts_RE, found) <= imbalance(counts_RE, slots_RS)
    assert np.array_equal(found, exact_replicas(counts_RE.sum(axis=0), found, 4, num_nodes))
    for rank, slot in np.argwhere(found[:, 4:] != EMPTY):
        assert found[rank, slot + 4] // 4 // (8 // num_nodes) == rank // (8 // num_nodes)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "spare", "sigma", "limit"),
    [(32, 8, 2, 1.5, 1.002), (32, 16, 2, 1.5, 1.002), (256, 64, 1, 1.0, 1.005), (256, 64, 2, 0.5, 1.002)],
)
def test_balance_of_drawn_loads(num_experts: int, num_ranks: int, spare: int, sigma: float, limit: float) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(12):
        counts_RE = random_counts(rng, num_ranks, num_experts, sigma=sigma, tokens=8192)
        slots_RS = contiguous_slots(num_experts, num_ranks, spare)
        new_RS = exact_replicas(counts_RE.sum(axis=0), slots_RS, num_experts // num_ranks)
        assert (new_RS[:, num_experts // num_ranks :] != EMPTY).sum() <= num_ranks + 3
        found.append(imbalance(counts_RE, new_RS))
    assert np.mean(found) <= limit


def test_no_tokens_need_no_replicas() -> None:
    slots_RS = contiguous_slots(8, 4, 2)
    assert np.array_equal(exact_replicas(np.zeros(8, np.int64), slots_RS, 2), slots_RS)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "sigma", "greedy", "searched"),
    [(128, 8, 1.5, 1.09, 1.036), (64, 8, 0.5, 1.05, 1.02), (128, 16, 0.5, 1.05, 1.012)],
)
def test_the_search_mends_what_the_greedy_pass_leaves(
    num_experts: int, num_ranks: int, sigma: float, greedy: float, searched: float
) -> None:
    """The worst of 32 draws, where the greedy pass alone is bad; never worse than it, whatever the trials."""
    rng, home_slots = np.random.default_rng(1), num_experts // num_ranks
    slots_RS, worst = contiguous_slots(num_experts, num_ranks, 1), np.ones(2)
    for _ in range(32):
        popularity = rng.lognormal(0, sigma, num_experts)
        counts_RE = rng.multinomial(16384, popularity / popularity.sum(), size=num_ranks)
        found = [
            imbalance(counts_RE, exact_replicas(counts_RE.sum(axis=0), slots_RS, home_slots, trials=trials))
            for trials in (0, 5, 16)
        ]
        assert found == sorted(found, reverse=True)
        worst = np.maximum(worst, [found[0], found[-1]])
    assert worst[0] > greedy
    assert worst[1] < searched
