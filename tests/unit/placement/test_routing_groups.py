"""Group-limited routing: between nodes whole groups are swapped, and a token goes to as few nodes as before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.placement.plan_homes import HomesOptions, plan_homes
from megatron_smartmoe.placement.routing_groups import domains, stay_whole
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement
from tests.unit.placement.cases import contiguous_slots


def nodes_of_groups(slots_RS: IntArray, home_slots: int, num_nodes: int, num_groups: int) -> list[set[int]]:
    """Nodes on which each group's experts have their homes."""
    rank_E = np.argsort(slots_RS[:, :home_slots].ravel()) // home_slots
    node_GE = (rank_E * num_nodes // len(slots_RS)).reshape(num_groups, -1)
    return [set(nodes) for nodes in node_GE.tolist()]


def test_two_groups_change_places() -> None:
    """Groups of 2 experts have loads 14 and 12 on node 0, 3 and 2 on node 1: 14 and 3 change places, heavier expert for
    heavier expert, which leaves 15 and 16."""
    load_E = np.array([8.0, 6, 7, 5, 1, 2, 1, 1])
    options = HomesOptions(num_nodes=2, num_groups=4)
    plan = plan_homes(contiguous_slots(8, 4, 1), load_E, 2, options)
    assert plan.swaps == ((0, 5), (1, 4))
    assert nodes_of_groups(plan.slots_RS, 2, 2, 4) == [{1}, {0}, {0}, {1}]


@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.sampled_from([2, 4, 8, 16]),
    spare=st.sampled_from([0, 1]),
    nodes=st.sampled_from([2, 4]),
)
def test_groups_stay_whole_and_the_load_falls(seed: int, groups: int, spare: int, nodes: int) -> None:
    load_E = np.random.default_rng(seed).lognormal(0, 1, 32)
    begin_RS = contiguous_slots(32, 8, spare)
    options = HomesOptions(num_nodes=nodes, num_groups=groups, swap_price=1e-4)
    plan = plan_homes(begin_RS, load_E, 4, options)
    assert max(map(len, nodes_of_groups(plan.slots_RS, 4, nodes, groups))) == max(1, nodes // groups)
    Placement(slots_LRS=plan.slots_RS[None], num_experts=32)
    units = nodes if spare else 8
    before, after = (load_E[rows[:, :4]].reshape(units, -1).sum(axis=1).max() for rows in (begin_RS, plan.slots_RS))
    assert after <= before
    free = plan_homes(begin_RS, load_E, 4, HomesOptions(num_nodes=nodes, swap_price=1e-4)).slots_RS
    if spare and groups == 2 and nodes == 4:  # experts move between the two nodes of their group
        assert after >= load_E[free[:, :4]].reshape(units, -1).sum(axis=1).max() - 1e-9


@pytest.mark.parametrize(("groups", "whole"), [(8, True), (4, True), (2, True), (3, False), (6, False)])
def test_where_groups_have_their_nodes(groups: int, whole: bool) -> None:
    assert stay_whole(8, 4, groups) == whole
    parts = {8: 4, 4: 4, 2: 2, 3: 1, 6: 1}[groups]
    assert len(set(domains(8, 4, groups).tolist())) == parts
