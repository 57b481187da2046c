"""Which replicas pay: a replica is made only if it takes more time off the busiest rank than its transfers cost.

Method. The time of a plan, in tokens of the busiest rank, is the tokens that this rank has with the best split, plus
the price of the transfers that have to follow one another until all replicas have their weights (`relay.py`), inside
nodes and between them, as far as no computation hides them (`cost.replicas.TransferPrice`). Of the planned replicas
those that take the fewest tokens are dropped until the transfers cost less, and of these the ones that made no
difference are put back, the largest first. What is left is judged, and the search goes on from there as long as the
busiest rank alone has less than the cheapest plan costs. Last, that plan is compared with no replicas at all. With many
replicas several are dropped at once and none is put back, which bounds the time.

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
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import best_balance
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of

_ONE_BY_ONE = 32  # replicas up to which they are dropped one by one
_AT_MOST = 0.75  # of the price of the transfers is left when more than that are dropped: few plans are judged,
_PARTS = 8  # and few trees built

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
    best = judged = _Judged.of(loads_KE, slots_RS, home_slots, price)
    # Step 1: drop the smallest replicas until their transfers cost less, as long as that can pay.
    while judged.transfers > 0 and judged.busiest < best.cost:
        judged = _Judged.of(loads_KE, judged.with_cheaper_transfers(), home_slots, price)
        if judged.cost < best.cost:
            best = judged
    # Step 2: no replicas at all may be cheaper still.
    bare_RS = slots_RS.copy()
    bare_RS[:, home_slots:] = EMPTY
    bare = 0.0
    for load_E in loads_KE:
        bare += float(load_E[bare_RS[:, :home_slots]].sum(axis=1).max()) / len(loads_KE)
    return bare_RS if bare <= best.cost else best.slots_RS


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A slot table judged on all loads: tokens of the busiest rank (the mean of the loads), those that each spare slot
    takes (the sum of the loads), and the price of the transfers."""

    slots_RS: IntArray
    home_slots: int
    busiest: float
    taken_RK: FloatArray
    price: TransferPrice
    transfers: float

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
        return cls(
            slots_RS=slots_RS,
            home_slots=home_slots,
            busiest=busiest,
            taken_RK=taken_RK,
            price=price,
            transfers=_price(slots_RS, home_slots, price),
        )

    @property
    def cost(self) -> float:
        """Tokens of the busiest rank that take as long as the layer."""
        return self.busiest + self.transfers

    def with_cheaper_transfers(self) -> IntArray:
        """The slots without the smallest replicas, as many as it takes until the transfers cost less."""
        fewer_RS = self.slots_RS.copy()
        rank_N, slot_N = np.unravel_index(np.argsort(self.taken_RK, axis=None, kind="stable"), self.taken_RK.shape)
        filled = int(np.isfinite(self.taken_RK).sum())
        at_once = 1 if filled <= _ONE_BY_ONE else filled // _PARTS
        # Step 1: drop.
        transfers, dropped = self.transfers, 0
        while transfers >= self.transfers or (at_once > 1 and transfers > _AT_MOST * self.transfers):
            more = slice(dropped, min(dropped + at_once, filled))
            fewer_RS[rank_N[more], self.home_slots + slot_N[more]] = EMPTY
            transfers, dropped = _price(fewer_RS, self.home_slots, self.price), more.stop
        # Step 2: put back what costs nothing.
        if at_once == 1:
            for rank, slot in zip(
                rank_N[: dropped - 1][::-1], self.home_slots + slot_N[: dropped - 1][::-1], strict=True
            ):
                fewer_RS[rank, slot] = self.slots_RS[rank, slot]
                if _price(fewer_RS, self.home_slots, self.price) > transfers:
                    fewer_RS[rank, slot] = EMPTY
        return fewer_RS


def _price(slots_RS: IntArray, home_slots: int, price: TransferPrice) -> float:
    return relay_tree(slots_RS, home_slots, price.num_nodes).price_tokens(price)


def cost_of_replicas(load_E: IntArray, slots_RS: IntArray, home_slots: int, price: TransferPrice) -> float:
    """Tokens of the busiest rank with the best split, and the price of the transfers, in tokens.

    Args:
        load_E: tokens of each expert.
        slots_RS: homes and replicas.
        home_slots: columns of homes.
        price: of their transfers.
    """
    busiest = best_balance(hosts_of(slots_RS, len(load_E)), load_E).bound
    return float(busiest) + _price(slots_RS, home_slots, price)
