"""The messages of a table of replicas, as each rank sees them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_smartmoe.runtime.replicas.links import Link, links_of
from tests.unit.placement.cases import random_slots

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
