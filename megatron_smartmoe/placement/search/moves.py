"""Small changes of a slot table, many at once: fill or empty a spare slot, exchange two replicas, swap two homes.

Every kind changes the hosts of at most two experts, by one rank each; that is all a search needs to judge it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.search.objective import Objective, Space
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray

NOWHERE = -1  # instead of a rank: the expert only loses or only gains a host
EXCHANGE = -2  # instead of a new expert: the move exchanges its two slots


@dataclass(frozen=True, kw_only=True)
class Moves:
    """M changes.

    Attributes:
        at_M2: flat indices of the one or two slots that change.
        new_M: what slot `at_M2[:, 0]` gets (EMPTY to clear it), or EXCHANGE.
        expert_M2: experts whose hosts change, EMPTY for none.
        from_M2: rank that loses the expert, or NOWHERE.
        to_M2: rank that gains it, or NOWHERE.
        price_M: what the move costs besides its effect on the loads.
        home_slots: columns of homes.
    """

    at_M2: IntArray
    new_M: IntArray
    expert_M2: IntArray
    from_M2: IntArray
    to_M2: IntArray
    price_M: FloatArray
    home_slots: int

    def __len__(self) -> int:
        return len(self.new_M)

    def applied(self, move: int, slots_RS: IntArray) -> IntArray:
        """New slots with one move made; a replica on the rank where its own home arrives is cleared."""
        slots_RS = slots_RS.copy()
        flat = slots_RS.reshape(-1)
        first, second = self.at_M2[move]
        if self.new_M[move] != EXCHANGE:
            flat[first] = self.new_M[move]
            return slots_RS
        flat[first], flat[second] = flat[second], flat[first]
        for at in (first, second):
            rank, slot = divmod(int(at), slots_RS.shape[1])
            spare = slots_RS[rank, self.home_slots :]
            if slot < self.home_slots:
                spare[spare == flat[at]] = EMPTY
        return slots_RS


@dataclass(frozen=True, kw_only=True)
class Table:
    """A slot table, and what decides which changes are allowed and what they cost.

    Attributes:
        slots_RS: the slots as they are.
        hosts_ER: whether rank r holds expert e.
        start_ER: whether it did when the search began: a replica that is new since then has its price.
        space: what may be changed.
        objective: prices.
    """

    slots_RS: IntArray
    hosts_ER: BoolArray
    start_ER: BoolArray
    space: Space
    objective: Objective

    def spare(self) -> tuple[IntArray, IntArray]:
        """Rank and column of every spare slot."""
        num_ranks, num_slots = self.slots_RS.shape
        rank = np.repeat(np.arange(num_ranks), num_slots - self.space.home_slots)
        return rank, np.tile(np.arange(self.space.home_slots, num_slots), num_ranks)

    def homes(self) -> tuple[IntArray, IntArray]:
        """Rank and column of every home slot."""
        num_ranks, home_slots = len(self.slots_RS), self.space.home_slots
        return np.repeat(np.arange(num_ranks), home_slots), np.tile(np.arange(home_slots), num_ranks)


def clearings(table: Table) -> Moves:
    """Clear a spare slot; one that is empty already is cleared too, so that every spare slot is there to compare."""
    rank, slot = table.spare()
    return _put(table, rank, slot, np.full(len(rank), EMPTY))


def replacements(table: Table, wanted_E: IntArray, cheap_S: IntArray) -> Moves:
    """Put an expert of `wanted_E` into a spare slot of `cheap_S` (numbered as in `clearings`) where it may lie."""
    rank, slot = (values[cheap_S] for values in table.spare())
    may_CR = (table.space.allowed_ER(table.slots_RS) & ~table.hosts_ER)[wanted_E]
    which, at = np.nonzero(may_CR[:, rank])
    return _put(table, rank[at], slot[at], wanted_E[which])


def _put(table: Table, rank: IntArray, slot: IntArray, new: IntArray) -> Moves:
    """Moves that put expert `new` (or EMPTY) into slot (rank, slot)."""
    slots_RS, start_ER, objective = table.slots_RS, table.start_ER, table.objective
    old = slots_RS[rank, slot]
    changed_new = (new != EMPTY) & ~start_ER[new, rank]
    changed_old = (old != EMPTY) & ~start_ER[old, rank]
    replicas = (new != EMPTY).astype(np.float64) - (old != EMPTY)
    nowhere = np.full(len(new), NOWHERE)
    flat = rank * slots_RS.shape[1] + slot
    return Moves(
        at_M2=np.stack([flat, flat], axis=1),
        new_M=new,
        expert_M2=np.stack([new, old], axis=1),
        from_M2=np.stack([nowhere, rank], axis=1),
        to_M2=np.stack([rank, nowhere], axis=1),
        price_M=objective.replica_price * replicas + objective.change_price * (changed_new * 1.0 - changed_old),
        home_slots=table.space.home_slots,
    )


def exchanges(table: Table, wanted_E: IntArray, cheap_S: IntArray) -> Moves:
    """Exchange a replica of an expert of `wanted_E` with what a spare slot of `cheap_S` on another rank holds."""
    rank, slot = table.spare()
    held = table.slots_RS[rank, slot]
    wanted_S = np.isin(held, wanted_E)
    may_ER = table.space.allowed_ER(table.slots_RS) & ~table.hosts_ER
    may_SR = np.where((held == EMPTY)[:, None], True, may_ER[held])  # what a slot holds may lie on rank r
    may_SS = may_SR[:, rank]
    cheap = np.isin(np.arange(len(held)), cheap_S)
    pairs_SS = may_SS & may_SS.T & wanted_S[:, None] & cheap & (held[:, None] != held)
    first, second = np.nonzero(pairs_SS & ~(np.tril(pairs_SS) & pairs_SS.T))  # each pair once
    return _exchange(table, (rank, slot), first, second, table.objective.change_price)


def home_swaps(table: Table, wanted_E: IntArray) -> Moves:
    """Swap the home of an expert of `wanted_E` with another home of the same node."""
    (rank, slot), node_R = table.homes(), table.space.node_R
    held = table.slots_RS[rank, slot]
    wanted_S = np.isin(held, wanted_E)
    first, second = np.nonzero(wanted_S[:, None] & (rank[:, None] != rank) & (node_R[rank][:, None] == node_R[rank]))
    once = ~wanted_S[second] | (first < second)
    first, second = first[once], second[once]
    swaps = _exchange(table, (rank, slot), first, second, table.objective.home_price)
    already = table.hosts_ER[swaps.expert_M2, swaps.to_M2]  # the home arrives at its own replica: one host less
    return Moves(**{**vars(swaps), "to_M2": np.where(already, NOWHERE, swaps.to_M2)})


def _exchange(
    table: Table, listed: tuple[IntArray, IntArray], first: IntArray, second: IntArray, price: float
) -> Moves:
    """Moves that exchange slots `first` and `second` of the list of (ranks, columns)."""
    (rank, slot), slots_RS, start_ER = listed, table.slots_RS, table.start_ER
    expert_M2 = np.stack([slots_RS[rank[first], slot[first]], slots_RS[rank[second], slot[second]]], axis=1)
    from_M2 = np.stack([rank[first], rank[second]], axis=1)
    to_M2 = from_M2[:, ::-1]
    filled = expert_M2 != EMPTY
    changed_after = filled & ~start_ER[expert_M2, to_M2]
    changed_before = filled & ~start_ER[expert_M2, from_M2]
    flat = rank * slots_RS.shape[1] + slot
    return Moves(
        at_M2=np.stack([flat[first], flat[second]], axis=1),
        new_M=np.full(len(first), EXCHANGE),
        expert_M2=expert_M2,
        from_M2=from_M2,
        to_M2=to_M2,
        price_M=price * (changed_after.sum(axis=1) - changed_before.sum(axis=1)),
        home_slots=table.space.home_slots,
    )
