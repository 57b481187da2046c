"""Which replicas pay: a replica is made only if it takes more time off the busiest rank than its transfers cost.

Method. The time of a plan, in tokens of the busiest rank, is the tokens that this rank has with the best split, plus
the price of the transfers that have to follow one another until all replicas have their weights (`relay.py`), inside
nodes and between them, as far as no computation hides them (`cost.replicas.TransferPrice`). Of the planned replicas the
one that takes the fewest tokens is dropped, then the next, until the transfers cost less. If that is faster it is kept,
and the search goes on from there; as soon as it cannot be, the search ends. Last, the plan is compared with no replicas
at all.

Example. On one node a transfer costs 700 tokens, none of it hidden. 7 replicas leave 4,096 tokens on the busiest rank
and need 3 transfers in a row: 4,096 + 2,100. Without the smallest two 2 are enough, and the busiest rank has 4,250:
4,250 + 1,400 is less, so they are dropped. Without another three, 1 is enough, but the busiest rank has 5,900, so they
stay.

With several loads the mean over them counts. Alternatives: trying every replica finds about 1% more with one slot on 16
ranks, with ten times the trials; a fixed least number of tokens for a replica (UltraEP) does not see that a replica
whose transfer waits for no other costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import best_balance
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of

# (loads_KE, slots_RS, home_slots, price) -> slots_RS: `without_losing_replicas`, or its compiled twin.
DropLosing = Callable[[IntArray, IntArray, int, TransferPrice], IntArray]


def without_losing_replicas(loads_KE: IntArray, slots_RS: IntArray, home_slots: int, price: TransferPrice) -> IntArray:
    """The slots without the replicas that cost more time than they save.

    Args:
        loads_KE: tokens of each expert in one load or several.
        slots_RS: homes and replicas.
        home_slots: columns of homes, E / R.
        price: of their transfers; where these are free all replicas stay.
    """
    if price.is_free:
        return slots_RS
    state = _Judged.of(loads_KE, slots_RS, home_slots, price)
    best_RS, best = slots_RS, state.busiest + state.transfers
    # Step 1: drop the smallest replicas until their transfers cost less, as long as that pays.
    pays = True
    while pays and state.transfers > 0:
        before, least = state.transfers, state.least_transfers
        while pays and state.transfers >= before:
            state = state.without_smallest(loads_KE)
            pays = state.busiest + least < best
        if pays:
            best_RS, best = state.slots_RS, state.busiest + state.transfers
    # Step 2: no replicas at all may be cheaper still.
    bare_RS = slots_RS.copy()
    bare_RS[:, home_slots:] = EMPTY
    bare = 0.0
    for load_E in loads_KE:
        bare += float(load_E[bare_RS[:, :home_slots]].sum(axis=1).max()) / len(loads_KE)
    return bare_RS if bare <= best else best_RS


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A slot table judged on all loads: tokens of the busiest rank (the mean of the loads), those that each spare slot
    takes (the sum of the loads), the price of the transfers, and what they cost with one fewer of them in a row."""

    slots_RS: IntArray
    home_slots: int
    busiest: float
    taken_RK: FloatArray
    price: TransferPrice
    transfers: float
    least_transfers: float

    @classmethod
    def of(cls, loads_KE: IntArray, slots_RS: IntArray, home_slots: int, price: TransferPrice) -> _Judged:
        hosts_ER = hosts_of(slots_RS, loads_KE.shape[1])
        rank_N, slot_N = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
        taken_RK, busiest = np.full((len(slots_RS), slots_RS.shape[1] - home_slots), np.inf), 0.0
        taken_RK[rank_N, slot_N] = 0.0
        for load_E in loads_KE:
            balance = best_balance(hosts_ER, load_E)
            busiest += float(balance.bound) / len(loads_KE)
            taken_RK[rank_N, slot_N] += balance.tokens_ER[slots_RS[rank_N, home_slots + slot_N], rank_N]
        inside, between = relay_tree(slots_RS, home_slots, price.num_nodes).steps_by_link(price.num_nodes)
        fewer = [price.tokens(inside - 1, between)] if inside else []
        fewer += [price.tokens(inside, between - 1)] if between else []
        return cls(
            slots_RS=slots_RS,
            home_slots=home_slots,
            busiest=busiest,
            taken_RK=taken_RK,
            price=price,
            transfers=price.tokens(inside, between),
            least_transfers=min(fewer, default=0.0),
        )

    def without_smallest(self, loads_KE: IntArray) -> _Judged:
        """Without the replica that takes the fewest tokens."""
        rank, slot = np.unravel_index(int(np.argmin(self.taken_RK)), self.taken_RK.shape)
        fewer_RS = self.slots_RS.copy()
        fewer_RS[rank, self.home_slots + int(slot)] = EMPTY
        return _Judged.of(loads_KE, fewer_RS, self.home_slots, self.price)


def paying_exact_replicas(
    load_E: IntArray,
    slots_RS: IntArray,
    home_slots: int,
    num_nodes: int,
    price: TransferPrice,
    limit: float,
    plan: Callable[[IntArray, IntArray, int, int], IntArray] = exact_replicas,
    drop: DropLosing = without_losing_replicas,
) -> IntArray:
    """Slots with replicas planned for exactly these tokens, as many as pay.

    Args:
        load_E: tokens of each expert.
        slots_RS: the slots as they are; only the homes are read.
        home_slots: columns of homes, E / R.
        num_nodes: a replica stays on the node of its home; 1 lets it go anywhere.
        price: see `without_losing_replicas`.
        limit: no replica is made while max / mean tokens per rank of the homes alone are at most this.
        plan: plans them; its arguments are the first four of `exact_replicas`.
        drop: drops those that do not pay.
    """
    bare_RS = slots_RS.copy()
    bare_RS[:, home_slots:] = EMPTY
    num_ranks, tokens = len(slots_RS), int(load_E.sum())
    busiest = int(load_E[slots_RS[:, :home_slots]].sum(axis=1).max())
    # Step 1: homes that are balanced well enough get no replicas.
    if busiest * num_ranks <= limit * tokens:
        return bare_RS
    # Step 2: plan replicas, and keep those that pay.
    return drop(load_E[None], plan(load_E, bare_RS, home_slots, num_nodes), home_slots, price)
