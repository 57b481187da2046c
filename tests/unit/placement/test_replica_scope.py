"""Replicas leave their nodes only where that is cheaper, and are not searched for over the group where it cannot be."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions, cheapest_exact_plan
from megatron_smartmoe.placement.kernels import NUMPY
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.replica_scope import cheapest_replicas
from megatron_smartmoe.placement.split import busiest_rank_tokens
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of
from tests.unit.placement.cases import contiguous_slots, random_counts

# 2 nodes of 2 ranks with one expert each: the first node has three quarters of the tokens, evenly on its ranks.
UNEVEN = np.array([300, 300, 100, 100])
BARE_RS = contiguous_slots(4, 4, 1)


def between(tokens: float) -> TransferPrice:
    """Transfers inside nodes cost 10 tokens, those between them as many as this."""
    return TransferPrice(fetch=LegPrice(inside_tokens=10.0, between_tokens=tokens), num_nodes=2)


def exact(load_E: IntArray, price: TransferPrice, *, or_group: bool = True) -> IntArray:
    options = ExactPlanOptions(num_nodes=2, or_group=or_group, price=price, limit=1.01)
    return cheapest_exact_plan(load_E, BARE_RS, 1, options).slots_RS


def history(load_E: IntArray, price: TransferPrice, *, or_group: bool = True) -> IntArray:
    options = ReplicaOptions(num_nodes=2, or_group=or_group, price=price)
    return cheapest_replicas(BARE_RS, load_E[None] / load_E.sum(), 1, options, float(load_E.mean()), NUMPY).slots_RS


@pytest.mark.parametrize("planned", [exact, history])
def test_replicas_leave_an_uneven_node_where_that_pays(planned: Callable[..., IntArray]) -> None:
    away_RS = planned(UNEVEN, between(60.0))
    assert away_RS[:, 1].tolist() in ([EMPTY, EMPTY, 0, 1], [EMPTY, EMPTY, 1, 0])
    assert (planned(UNEVEN, between(120.0)) == BARE_RS).all()
    assert (planned(UNEVEN, between(60.0), or_group=False) == BARE_RS).all()


@pytest.mark.parametrize("seed", range(12))
def test_never_dearer_than_within_nodes_or_over_the_group(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load_E, slots_RS = random_counts(rng, 8, 16, sigma=1.5).sum(axis=0), contiguous_slots(16, 8, 1)
    price = TransferPrice(
        fetch=LegPrice(inside_tokens=30.0, between_tokens=float(rng.choice([30.0, 300.0]))), num_nodes=4
    )

    def cost(num_nodes: int, *, or_group: bool) -> float:
        options = ExactPlanOptions(num_nodes=num_nodes, or_group=or_group, price=price, limit=1.01)
        found_RS = cheapest_exact_plan(load_E, slots_RS, 2, options).slots_RS
        return busiest_rank_tokens(hosts_of(found_RS, 16), load_E) + relay_tree(found_RS, 2, 4).price_tokens(price)

    within, anywhere = cost(4, or_group=False), cost(1, or_group=False)
    assert cost(4, or_group=True) <= within
    load_N = load_E.reshape(4, -1).sum(axis=1)
    if load_N.max() * 4 > 1.01 * load_N.sum():
        assert cost(4, or_group=True) == min(within, anywhere)


def test_present_replicas_on_other_nodes_are_kept_while_they_are_cheaper() -> None:
    options = ReplicaOptions(num_nodes=2, or_group=True, price=between(60.0))
    scenarios_KE, present_RS = UNEVEN[None] / UNEVEN.sum(), BARE_RS.copy()
    present_RS[2:, 1] = [1, 0]
    assert (cheapest_replicas(present_RS, scenarios_KE, 1, options, 200.0, NUMPY).slots_RS == present_RS).all()
    even_KE = np.full((1, 4), 0.25)
    assert (cheapest_replicas(present_RS, even_KE, 1, options, 200.0, NUMPY).slots_RS == BARE_RS).all()
