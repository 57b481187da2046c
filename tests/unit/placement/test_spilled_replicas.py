"""Few large replicas: each takes as much as its slot can, and no rank spills more of them than the busiest must."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.spilled_replicas import spilled_replicas
from megatron_smartmoe.placement.split import busiest_rank_tokens
from megatron_smartmoe.spec.placement import EMPTY, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts


def test_the_example_of_the_module() -> None:
    load_E, slots_RS = np.array([105, 95, 104, 96, 0, 0, 0, 0]), contiguous_slots(8, 4, 2)
    found_RS = spilled_replicas(load_E, slots_RS, 2)
    assert found_RS[:, 2:].tolist() == [[EMPTY, EMPTY], [EMPTY, EMPTY], [0, EMPTY], [2, EMPTY]]
    assert busiest_rank_tokens(hosts_of(found_RS, 8), load_E) == 100
    assert relay_tree(found_RS, 2).steps_by_link(1) == (1, 0)


def test_what_does_not_fit_is_spilled_again() -> None:
    # one expert has all tokens: three ranks take their share of it
    found_RS = spilled_replicas(np.array([400, 0, 0, 0]), contiguous_slots(4, 4, 1), 1)
    assert found_RS[:, 1].tolist() == [EMPTY, 0, 0, 0]
    # a surplus of 150 tokens: 100 of expert 0 fit on either rank, its other 20 and 30 of expert 1 on the second
    found_RS = spilled_replicas(np.array([120, 130, 100, 0, 0, 0, 50, 0]), contiguous_slots(8, 4, 2), 2)
    assert found_RS[:, 2:].tolist() == [[EMPTY, EMPTY], [EMPTY, EMPTY], [1, EMPTY], [0, EMPTY]]


def test_half_of_the_ranks_are_idle() -> None:
    """A load that a plan which fills every gap to the token makes many transfers for."""
    rng = np.random.default_rng(3)
    load_E = np.concatenate([np.zeros(64, dtype=np.int64), rng.integers(900, 1100, 64)])
    bare_RS = contiguous_slots(128, 32, 2)
    spilled_RS, filled_RS = spilled_replicas(load_E, bare_RS, 4), exact_replicas(load_E, bare_RS, 4)
    steps = [relay_tree(each_RS, 4).steps_by_link(1)[0] for each_RS in (spilled_RS, filled_RS)]
    busiest = [busiest_rank_tokens(hosts_of(each_RS, 128), load_E) for each_RS in (spilled_RS, filled_RS)]
    assert steps[0] == 2 < steps[1]
    assert busiest[1] <= busiest[0] < 1.05 * load_E.sum() / 32


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(16, 8, 1, 1), (32, 8, 2, 2), (64, 16, 3, 4), (24, 4, 2, 1), (8, 8, 0, 2)]),
    st.floats(0.0, 2.5),
)
def test_it_is_a_placement_that_is_never_worse_than_the_homes(
    seed: int, sizes: tuple[int, int, int, int], sigma: float
) -> None:
    num_experts, num_ranks, spare, num_nodes = sizes
    load_E = random_counts(np.random.default_rng(seed), num_ranks, num_experts, sigma=sigma).sum(axis=0)
    bare_RS, home_slots = contiguous_slots(num_experts, num_ranks, spare), num_experts // num_ranks
    found_RS = spilled_replicas(load_E, bare_RS, home_slots, num_nodes)
    assert (found_RS[:, :home_slots] == bare_RS[:, :home_slots]).all()
    node_R = np.arange(num_ranks) * num_nodes // num_ranks
    for rank, row in enumerate(found_RS):
        held = row[row != EMPTY].tolist()
        assert len(set(held)) == len(held), "no expert twice on a rank"
        assert all(node_R[expert // home_slots] == node_R[rank] for expert in held)
    homes = busiest_rank_tokens(hosts_of(bare_RS, num_experts), load_E)
    assert busiest_rank_tokens(hosts_of(found_RS, num_experts), load_E) <= homes


@pytest.mark.parametrize("seed", range(10))
def test_no_rank_sends_more_than_the_one_that_needs_most(seed: int) -> None:
    load_E = random_counts(np.random.default_rng(seed), 16, 64, sigma=1.0).sum(axis=0)
    found_RS = spilled_replicas(load_E, contiguous_slots(64, 16, 4), 4)
    mean, load_RH = -(-int(load_E.sum()) // 16), load_E.reshape(16, 4)
    room, needed = mean - int(load_RH.sum(axis=1).min()), []
    for homes_E in load_RH:
        surplus, pieces = int(homes_E.sum()) - mean, 0
        for tokens in sorted(homes_E.tolist(), reverse=True):
            if surplus > 0:
                pieces += max(1, int(min(tokens, surplus) / room + 0.5))
            surplus -= tokens
        needed.append(pieces)
    spilled_E = np.bincount(found_RS[:, 4:][found_RS[:, 4:] != EMPTY], minlength=64)
    assert 0 < spilled_E.reshape(16, 4).sum(axis=1).max() <= max(needed)
    assert (found_RS[:, 4:] != EMPTY).sum(axis=1).max() <= max(needed)
