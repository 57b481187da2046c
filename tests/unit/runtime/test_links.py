"""The messages of a table of replicas, as each rank sees them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_smartmoe.cost.comm import busiest_ports
from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import relayed_flow
from megatron_smartmoe.placement.plan_replicas import replicas_pay
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.runtime.replicas.links import Link, links_of
from tests.unit.placement.cases import random_slots

WEIGHT_BYTES = 1000
SLOTS = np.array([[0, 1, -1], [2, 3, 0], [4, 5, 0], [6, 7, 0]])  # three replicas of expert 0: rank 1 feeds another


def test_a_relay() -> None:
    """The home feeds rank 1, which feeds rank 2 while the home feeds rank 3."""
    first = Link(number=0, round=0, back_round=1, parent=0, parent_slot=0, from_home=True, child=1, slot=0, relays=True)
    last = first._replace(number=2, round=1, back_round=0, child=3, relays=False)
    relayed = last._replace(number=1, parent=1, from_home=False, child=2)
    of_ranks = [links_of(SLOTS, 2, rank, 1) for rank in range(4)]
    assert of_ranks == [(first, last), (first, relayed), (relayed,), (last,)]


@pytest.mark.parametrize("seed", range(20))
def test_both_ends_see_the_same_message(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots_RS = random_slots(rng, 16, 8, 2)
    of_ranks = [links_of(slots_RS, 2, rank, 2) for rank in range(8)]
    ends: dict[int, list[Link]] = {}
    for rank, links in enumerate(of_ranks):
        assert list(links) == sorted(links, key=lambda link: (link.round, link.number))
        for link in links:
            assert rank in (link.parent, link.child)
            column = link.parent_slot + (0 if link.from_home else 2)
            assert slots_RS[link.parent, column] == slots_RS[link.child, 2 + link.slot]
            ends.setdefault(link.number, []).append(link)
    assert len(ends) == int((slots_RS[:, 2:] >= 0).sum())
    for one, other in ends.values():
        assert one == other
        feeds = [link for link in of_ranks[one.child] if link.parent == one.child and not link.from_home]
        fed = [link for link in feeds if slots_RS[link.child, 2 + link.slot] == slots_RS[one.child, 2 + one.slot]]
        assert one.relays == bool(fed)
        assert all(link.round > one.round and link.back_round < one.back_round for link in fed)


@pytest.mark.parametrize("kernels", [NUMPY, fastest_kernels()], ids=["numpy", "fastest"])
@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_what_is_priced_is_what_the_ports_carry(num_nodes: int, kernels: Kernels) -> None:
    """The busiest port of each kind of link carries as many bytes of weights as the price's tree says, and no more
    transfers than the price counts follow one another, for replicas that may lie anywhere."""
    for seed in range(10):
        slots_RS = random_slots(np.random.default_rng(seed), 16, 8, 2)
        sent_bytes, received_bytes = np.zeros((2, 8)), np.zeros((2, 8))  # by kind of link and rank
        for rank in range(8):
            for link in links_of(slots_RS, 2, rank, num_nodes):
                crosses = int(link.parent * num_nodes // 8 != link.child * num_nodes // 8)
                (sent_bytes if rank == link.parent else received_bytes)[crosses, rank] += WEIGHT_BYTES
        nothing_ER, nothing_RR = np.zeros((16, 8)), np.zeros((8, 8))
        flow = relayed_flow(slots_RS, nothing_ER, nothing_RR, num_nodes, kernels)
        priced = busiest_ports(flow.replicas_RR, num_nodes)
        busiest = np.maximum(sent_bytes.max(axis=1), received_bytes.max(axis=1))
        assert busiest.tolist() == [priced.intra * WEIGHT_BYTES, priced.inter_gpu * WEIGHT_BYTES]
        steps = relay_tree(slots_RS, 2, num_nodes).steps_by_link(num_nodes)
        assert flow.replica_steps == steps
        assert all(step * WEIGHT_BYTES >= port for step, port in zip(steps, busiest, strict=True))
        # the planners' price: of weights alone, a token for each byte inside a node and two for each between nodes
        legs = LegPrice(inside_tokens=WEIGHT_BYTES, between_tokens=2 * WEIGHT_BYTES)
        price = TransferPrice(fetch=legs, num_nodes=num_nodes)
        tokens = WEIGHT_BYTES * (steps[0] + 2 * steps[1])
        assert replicas_pay(slots_RS, 2, tokens + 1, price)
        assert not replicas_pay(slots_RS, 2, tokens, price)
