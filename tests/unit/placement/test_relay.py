"""Relay trees: every replica is fed once, by a rank that has the weights by then, and no port is much busier than it
must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.placement.relay import RelayTree, relay_tree
from megatron_smartmoe.runtime.replicas.kernels import COMPILED
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, with_empty_slots
from tests.unit.placement.cases import contiguous_slots


def slots_with(num_ranks: int, home_slots: int, spare_slots: int, replicas: dict[int, list[int]]) -> IntArray:
    """Experts by home, and each expert's replicas on the given ranks."""
    slots_RS = contiguous_slots(num_ranks * home_slots, num_ranks, spare_slots)
    for expert, ranks in replicas.items():
        for rank in ranks:
            slots_RS[rank, home_slots + int(np.argmax(slots_RS[rank, home_slots:] == EMPTY))] = expert
    return slots_RS


@st.composite
def slot_tables(draw: st.DrawFn) -> tuple[IntArray, int, int]:
    """A slot table with random homes and replicas, its home slots, and nodes."""
    num_nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    home_slots, spare_slots = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = num_nodes * per_node
    homes_RS = rng.permutation(num_ranks * home_slots).reshape(num_ranks, home_slots)
    slots_RS = with_empty_slots(homes_RS, spare_slots)
    weight_E = rng.lognormal(0, draw(st.floats(0, 3)), homes_RS.size)
    for rank in range(num_ranks):
        others = np.setdiff1d(np.arange(homes_RS.size), homes_RS[rank])
        count = min(spare_slots, len(others), int(rng.integers(0, spare_slots + 1)))
        slots_RS[rank, home_slots : home_slots + count] = rng.choice(
            others, count, replace=False, p=weight_E[others] / weight_E[others].sum() if count else None
        )
    return slots_RS, home_slots, num_nodes


def fed(slots_RS: IntArray, home_slots: int, tree: RelayTree) -> list[tuple[int, int, int, int, int]]:
    """(round, expert, parent, parent's slot, rank) of every replica, round by round."""
    rank_N, slot_N = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
    at = (rank_N, slot_N)
    expert_N = slots_RS[rank_N, home_slots + slot_N]
    columns = (tree.round_RK[at], expert_N, tree.parent_RK[at], tree.parent_slot_RK[at], rank_N)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(slot_tables())
def test_every_replica_is_fed_by_a_rank_that_has_the_weights(case: tuple[IntArray, int, int]) -> None:
    slots_RS, home_slots, num_nodes = case
    tree = relay_tree(slots_RS, home_slots, num_nodes)
    assert ((tree.parent_RK == EMPTY) == (slots_RS[:, home_slots:] == EMPTY)).all()
    has = {(int(expert), rank): -1 for rank, row in enumerate(slots_RS[:, :home_slots]) for expert in row}
    senders = set()
    for turn, expert, parent, parent_slot, rank in fed(slots_RS, home_slots, tree):
        assert has[expert, parent] < turn, "a parent has the weights before the round begins"
        assert slots_RS[parent, parent_slot] == expert
        assert (expert, rank) not in has, "one parent for each replica"
        assert (expert, parent, turn) not in senders, "one child per expert and round"
        senders.add((expert, parent, turn))
        has[expert, rank] = turn
    assert len(has) == (slots_RS != EMPTY).sum()


@settings(max_examples=60, deadline=None)
@given(slot_tables())
def test_rounds_and_nodes(case: tuple[IntArray, int, int]) -> None:
    slots_RS, home_slots, num_nodes = case
    node_R = np.arange(len(slots_RS)) // (len(slots_RS) // num_nodes)
    tree = relay_tree(slots_RS, home_slots, num_nodes)
    for expert in np.unique(slots_RS[:, home_slots:][slots_RS[:, home_slots:] != EMPTY]):
        home = int(np.argwhere(slots_RS[:, :home_slots] == expert)[0, 0])
        held = slots_RS[:, home_slots:] == expert
        rank_N = np.nonzero(held)[0]
        # members of each node, the home among them
        members_V = np.bincount(node_R[[home, *rank_N]], minlength=num_nodes)
        num_others = int((members_V > 0).sum()) - 1
        most = int(num_others).bit_length() + int(members_V.max() - 1).bit_length()
        assert tree.round_RK[held].max() < most
        # the weights enter every other node once
        entered = node_R[rank_N[node_R[tree.parent_RK[held]] != node_R[rank_N]]]
        assert sorted(entered) == sorted(set(node_R[rank_N]) - {node_R[home]})


def test_the_example_of_the_module() -> None:
    tree = relay_tree(slots_with(8, 1, 1, {0: [1, 2, 3, 4, 5, 6]}), 1)
    assert tree.parent_RK.ravel().tolist() == [EMPTY, 0, 1, 0, 2, 3, 1, EMPTY]
    assert tree.round_RK.ravel().tolist() == [EMPTY, 0, 1, 1, 2, 2, 2, EMPTY]
    assert tree.num_rounds == 3
    assert tree.transfers_RR().sum(axis=1).max() == 2


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7, 8, 15, 16, 31, 63])
def test_rounds_are_the_logarithm_of_the_replicas(replicas: int) -> None:
    tree = relay_tree(slots_with(64, 1, 1, {5: [rank for rank in range(64) if rank != 5][:replicas]}), 1)
    assert tree.num_rounds == int(np.ceil(np.log2(replicas + 1)))
    assert tree.transfers_RR().sum(axis=1).max() <= tree.num_rounds


def test_a_home_of_several_hot_experts_sends_each_of_them_once() -> None:
    hot = {0: [1, 2], 1: [3, 4], 2: [5, 6]}
    tree = relay_tree(slots_with(8, 4, 1, hot), 4)
    assert tree.transfers_RR().sum(axis=1).tolist() == [3, 1, 0, 1, 0, 1, 0, 0]
    assert tree.num_rounds == 2


def test_no_rank_sends_twice_in_a_round_where_others_could() -> None:
    hot = {0: [2, 3, 4], 4: [5, 6, 7]}  # homes on ranks 0 and 1
    tree = relay_tree(slots_with(8, 4, 2, hot), 4)
    rank, slot = np.nonzero(tree.parent_RK != EMPTY)
    sends = list(zip(tree.round_RK[rank, slot].tolist(), tree.parent_RK[rank, slot].tolist(), strict=True))
    assert len(set(sends)) == len(sends)


def test_steps_count_the_port_and_the_rounds() -> None:
    one_home = relay_tree(slots_with(8, 4, 1, {0: [1], 1: [2], 2: [3]}), 4)
    assert (one_home.num_rounds, one_home.steps_by_link(1)) == (1, (3, 0)), "one port sends three experts"
    one_expert = relay_tree(slots_with(8, 1, 1, {0: [1, 2, 3]}), 1)
    assert (one_expert.num_rounds, one_expert.steps_by_link(1)) == (2, (2, 0))
    assert relay_tree(slots_with(8, 1, 1, {}), 1).steps_by_link(1) == (0, 0)


def test_messages_of_a_round_share_the_ports() -> None:
    """Four homes feed two ranks each, and each of those is fed by two: every port has two messages, in one round. In no
    order of single transfers would a port wait longer than that."""
    ring = {2 * home + each: [4 + (home + each) % 4] for home in range(4) for each in range(2)}
    tree = relay_tree(slots_with(8, 2, 2, ring), 2)
    assert (tree.num_rounds, tree.steps_by_link(1)) == (1, (2, 0))


def test_a_round_begins_when_the_one_before_has_arrived() -> None:
    """Rank 0 sends expert 0 and two others at once, so expert 0 arrives after three transfers; then rank 1 forwards it
    while rank 0 sends it again."""
    tree = relay_tree(slots_with(8, 4, 1, {0: [1, 2, 3], 1: [4], 2: [5]}), 4)
    assert tree.parent_RK[:, 0].tolist() == [EMPTY, 0, 1, 0, 0, 0, EMPTY, EMPTY]
    assert (tree.num_rounds, tree.steps_by_link(1)) == (2, (4, 0))


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=60, deadline=None)
@given(slot_tables())
def test_the_op_counts_the_same_steps(case: tuple[IntArray, int, int]) -> None:
    slots_RS, home_slots, num_nodes = case
    counts_RE = np.ones((len(slots_RS), len(slots_RS) * home_slots), dtype=np.int64)
    found = COMPILED.flow(counts_RE, slots_RS, home_slots, num_nodes, None).replica_steps
    assert found == relay_tree(slots_RS, home_slots, num_nodes).steps_by_link(num_nodes)


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=60, deadline=None)
@given(slot_tables())
def test_the_op_builds_the_same_trees(case: tuple[IntArray, int, int]) -> None:
    slots_RS, home_slots, num_nodes = case
    tree = relay_tree(slots_RS, home_slots, num_nodes)
    found = ops.relay_tree(torch.from_numpy(slots_RS), home_slots, num_nodes).numpy()
    assert (found == np.stack([tree.parent_RK, tree.parent_slot_RK, tree.round_RK])).all()


def test_no_spare_slots_no_transfers() -> None:
    tree = relay_tree(slots_with(4, 2, 0, {}), 2)
    assert tree.num_rounds == 0
    assert not tree.transfers_RR().any()
