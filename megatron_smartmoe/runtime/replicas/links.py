"""The messages of one table of replicas, as one rank sees them: who feeds whom, in which round."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY

_KEPT = 1024  # tables whose links are kept: history changes few layers' a step, and recomputation asks twice


class Link(NamedTuple):
    """A replica and the rank that its weights come from: its home, or a rank that got them in an earlier round.

    A named tuple, because a layer makes them anew for every micro-batch: a dataclass takes several times as long.

    Attributes:
        number: The replica's place among those of the table, by rank, then slot.
        round: In which the weights travel from the parent to the child.
        back_round: In which the gradient travels from the child to the parent: the last first.
        parent: A rank.
        parent_slot: A home slot of it, or a spare slot.
        from_home: Whether the parent is the expert's home.
        child: The rank that holds the replica.
        slot: The spare slot there.
        relays: Whether the child feeds others.
    """

    number: int
    round: int
    back_round: int
    parent: int
    parent_slot: int
    from_home: bool
    child: int
    slot: int
    relays: bool


def links_of(slots_RS: IntArray, home_slots: int, rank: int, num_nodes: int) -> tuple[Link, ...]:
    """The links in which a rank takes part, by round, then number.

    Args:
        slots_RS: The slot table; expert e is at home on rank e // S in home slot e % S.
        home_slots: S, the home slots of a rank.
        rank: One of the group.
        num_nodes: Nodes that the group lies on.
    """
    return _links_of(slots_RS.astype(np.int64).tobytes(), slots_RS.shape, home_slots, rank, num_nodes)


@functools.lru_cache(maxsize=_KEPT)
def _links_of(table: bytes, shape: tuple[int, ...], home_slots: int, rank: int, num_nodes: int) -> tuple[Link, ...]:
    slots_RS = np.frombuffer(table, dtype=np.int64).reshape(shape)
    tree = fastest_kernels().relay(slots_RS, home_slots, num_nodes)
    parent_RK, column_RK, round_RK = tree.parent_RK, tree.parent_slot_RK, tree.round_RK
    child_N, slot_N = place_N = np.nonzero(parent_RK != EMPTY)
    expert_N, parent_N = slots_RS[child_N, home_slots + slot_N], parent_RK[place_N]
    column_N, round_N = column_RK[place_N], round_RK[place_N]
    rounds_E = np.zeros(len(slots_RS) * home_slots, dtype=np.int64)
    np.maximum.at(rounds_E, expert_N, round_N + 1)
    feeding = set(zip(expert_N.tolist(), parent_N.tolist(), strict=True))
    links = []
    for number in np.flatnonzero((child_N == rank) | (parent_N == rank)).tolist():
        expert, child, column, in_round = (int(each[number]) for each in (expert_N, child_N, column_N, round_N))
        from_home = column < home_slots
        links.append(
            Link(
                number=number,
                round=in_round,
                back_round=int(rounds_E[expert]) - 1 - in_round,
                parent=int(parent_N[number]),
                parent_slot=column if from_home else column - home_slots,
                from_home=from_home,
                child=child,
                slot=int(slot_N[number]),
                relays=(expert, child) in feeding,
            )
        )
    return tuple(sorted(links, key=lambda link: (link.round, link.number)))
