"""The split: optimal to the token, conserving, deterministic, local first."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.split import assign_sources, min_max_split
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts, random_slots

SHAPES = [(8, 4, 1), (12, 4, 2), (16, 8, 1), (32, 8, 1), (8, 8, 2), (4, 2, 1)]


def optimum(load_E: IntArray, hosts_ER: BoolArray) -> int:
    """The smallest largest rank load over integer splits, from HiGHS."""
    expert, rank = np.nonzero(hosts_ER)
    num_hosts, num_ranks = len(expert), hosts_ER.shape[1]
    conserve = np.zeros((len(load_E), num_hosts + 1))
    conserve[expert, np.arange(num_hosts)] = 1
    below = np.zeros((num_ranks, num_hosts + 1))
    below[rank, np.arange(num_hosts)] = 1
    below[:, -1] = -1
    result = milp(
        c=np.eye(num_hosts + 1)[-1],
        constraints=[LinearConstraint(conserve, load_E, load_E), LinearConstraint(below, -np.inf, 0)],
        integrality=np.ones(num_hosts + 1),
        bounds=Bounds(0, np.inf),
    )
    assert result.success, result.message
    return round(float(result.fun))


def problem(seed: int) -> tuple[IntArray, IntArray]:
    rng = np.random.default_rng(seed)
    num_experts, num_ranks, spare = SHAPES[seed % len(SHAPES)]
    counts_RE = random_counts(rng, num_ranks, num_experts, sigma=rng.uniform(0, 2), tokens=int(rng.integers(1, 5000)))
    return counts_RE, random_slots(rng, num_experts, num_ranks, spare)


@given(seed=st.integers(0, 2**32 - 1))
def test_split_is_optimal_and_conserves_tokens(seed: int) -> None:
    counts_RE, slots_RS = problem(seed)
    hosts_ER = hosts_of(slots_RS, counts_RE.shape[1])
    tokens_ER = min_max_split(counts_RE, hosts_ER)
    assert (tokens_ER >= 0).all()
    assert (tokens_ER.sum(axis=1) == counts_RE.sum(axis=0)).all()
    assert not tokens_ER[~hosts_ER].any()
    assert tokens_ER.sum(axis=0).max() == optimum(counts_RE.sum(axis=0), hosts_ER)
    assert np.array_equal(tokens_ER, min_max_split(counts_RE.copy(), hosts_ER.copy()))


@given(seed=st.integers(0, 2**32 - 1))
def test_every_token_lands_on_exactly_one_host_of_its_expert(seed: int) -> None:
    counts_RE, slots_RS = problem(seed)
    num_experts = counts_RE.shape[1]
    tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, num_experts))
    for num_nodes in (1, 2):
        sent_RRS = assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)
        assert (sent_RRS >= 0).all()
        assert not sent_RRS[:, slots_RS == EMPTY].any()
        for expert in range(num_experts):
            to_hosts = sent_RRS[:, slots_RS == expert]
            assert (to_hosts.sum(axis=1) == counts_RE[:, expert]).all()
            assert (to_hosts.sum(axis=0) == tokens_ER[expert, np.nonzero(slots_RS == expert)[0]]).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_tokens_stay_on_their_rank_then_on_their_node(seed: int) -> None:
    counts_RE, slots_RS = problem(seed)
    num_ranks, num_experts = counts_RE.shape
    tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, num_experts))
    for num_nodes in (1, 2):
        sent_RRS = assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)
        per_node = num_ranks // num_nodes
        for expert, node in itertools.product(range(num_experts), range(num_nodes)):
            ranks = slice(node * per_node, (node + 1) * per_node)
            within = sent_RRS[ranks, ranks][:, slots_RS[ranks] == expert]
            supply, wanted = counts_RE[ranks, expert].sum(), tokens_ER[expert, ranks].sum()
            assert within.sum() == min(supply, wanted)
            # Every host on the node gets the same share from it, as far as whole tokens go, from its own rank first.
            at = np.nonzero(slots_RS[ranks] == expert)[0]
            share = tokens_ER[expert, ranks][at] * (within.sum() / max(int(wanted), 1))
            if (slots_RS == expert).sum() > 1:
                assert np.abs(within.sum(axis=0) - share).max(initial=0) < 1
                own = within[at, np.arange(len(at))]
                assert (own == np.minimum(counts_RE[ranks, expert][at], within.sum(axis=0))).all()


def test_what_crosses_between_nodes_is_spread_over_the_ranks() -> None:
    """Expert 0 on both ranks of node 0, which compute 60 of its tokens each; 40 are from their node, 80 are not."""
    slots_RS = contiguous_slots(4, 4, 1)
    slots_RS[1, 1] = 0
    counts_RE = np.array([[40, 0, 0, 0], [0, 0, 0, 0], [40, 0, 60, 0], [40, 0, 0, 60]])
    tokens_ER = np.array([[60, 60, 0, 0], [0, 0, 0, 0], [0, 0, 60, 0], [0, 0, 0, 60]])
    sent_RR = assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes=2).sum(axis=2)
    assert sent_RR[2:, :2].sum(axis=0).tolist() == [40, 40]
    assert sent_RR[:2, :2].tolist() == [[20, 20], [0, 0]]


def test_a_hot_expert_is_shared_to_the_token() -> None:
    slots_RS = contiguous_slots(4, 2, 1)
    slots_RS[1, 2] = 0
    counts_RE = np.array([[7, 1, 1, 0], [4, 0, 1, 1]])  # expert 0: 11, the others 4: the best is 8 and 7
    tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, 4))
    assert sorted(tokens_ER.sum(axis=0).tolist()) == [7, 8]


def test_the_bound_rises_where_loads_are_locked_in() -> None:
    """Experts 0 and 1 live on ranks 0 and 1 only: those two share 20, whatever ranks 2 and 3 do."""
    slots_RS = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    counts_RE = np.array([[20, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert min_max_split(counts_RE, hosts_of(slots_RS, 4)).sum(axis=0).tolist() == [10, 10, 1, 1]


def test_an_expert_without_a_host_is_named() -> None:
    with pytest.raises(PlanError, match="expert 1 has 3 tokens and no slot on any rank"):
        min_max_split(np.array([[1, 3]]), np.array([[True], [False]]))


def test_no_tokens_and_no_replicas_are_fine() -> None:
    slots_RS = contiguous_slots(4, 2, 1)
    assert not min_max_split(np.zeros((2, 4), np.int64), hosts_of(slots_RS, 4)).any()
    assert min_max_split(np.ones((2, 4), np.int64), hosts_of(slots_RS, 4)).sum(axis=0).tolist() == [4, 4]
