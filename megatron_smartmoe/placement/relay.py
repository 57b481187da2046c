"""Who feeds whom: replicas' weights go out along a tree per expert, on which holders forward them.

Method. An expert with n replicas would have its home send its weights n times over one port, while the ports of the
holders are idle. A rank that has the weights can forward them instead, so that the ranks that have them double with
every round and n replicas take ceil(log2(n + 1)) rounds. In every round no more transfers are made than the rounds that
are left require, by those ranks that send least over all experts: homes of several hot experts then send each of them
once or twice, and the holders do the rest. The home sends to the holder that sends least, which has the most rounds
left to forward in.

Where the replicas lie on several nodes, an expert's weights enter each node once: rounds between nodes first, one
holder a node, then rounds inside the nodes.

Gradients return along the same tree, reversed: the rounds run from the last to the first, and a rank adds what a child
sends to its own sum when its round comes. A rank has at most one child per expert and round, so the order of the sums
is fixed: the rank's own gradient, then those of its children, the one fed last first.

Example. 8 ranks, expert 0 with its home on rank 0 and replicas on ranks 1 to 6, nothing else. Three rounds:

    round 0   0 -> 1
    round 1   0 -> 3    1 -> 2
    round 2   1 -> 6    2 -> 4    3 -> 5

Rank 0 sends twice instead of six times, and no rank more often. The gradient of expert 0 is summed as
(g0 + (g3 + g5)) + ((g1 + g6) + (g2 + g4)).

Alternatives: a chain sends once per rank, but takes n rounds; a plain binomial tree needs as many rounds as this one,
but its home sends in every round, which a home of several hot experts pays for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray


@dataclass(frozen=True, kw_only=True, eq=False)
class RelayTree:
    """Where the replica in each spare slot comes from; EMPTY throughout where the slot is empty.

    Attributes:
        parent_RK: the rank that sends the weights, and gets the gradient.
        parent_slot_RK: the column of the slot table in which that rank has the expert: a home slot, or the spare slot
            that it has got the weights in itself.
        round_RK: the round of the transfer, from 0. A parent has the weights before that round begins.
        home_slots: S, columns of the slot table before the spare slots.
    """

    parent_RK: IntArray
    parent_slot_RK: IntArray
    round_RK: IntArray
    home_slots: int

    @property
    def num_rounds(self) -> int:
        """Rounds until every replica has its weights."""
        return int(self.round_RK.max(initial=EMPTY)) + 1

    def steps_by_link(self, num_nodes: int) -> tuple[int, int]:
        """Transfers that follow one another, inside nodes and between them, until every replica has its weights.

        It is what replicas' traffic is priced by, counted as the messages run (`runtime/replicas/transfer.py`): those
        of a round all start together and share the ports, so that one takes as long as the busier of its two ports has
        messages in that round; a rank begins a round when its messages of the rounds before have arrived.
        """
        node_R = np.arange(len(self.parent_RK)) * num_nodes // len(self.parent_RK)
        crosses_RK = node_R[self.parent_RK] != node_R[:, None]
        filled_RK = self.parent_RK != EMPTY
        return self._steps(filled_RK & ~crosses_RK), self._steps(filled_RK & crosses_RK)

    def price_tokens(self, price: TransferPrice) -> float:
        """Tokens of the busiest rank that take as long as the transfers; on as many nodes as the price is for."""
        return price.tokens(*self.steps_by_link(price.num_nodes))

    def _steps(self, counted_RK: BoolArray) -> int:
        ended_R = np.zeros(len(self.parent_RK), dtype=np.int64)  # of the rounds so far
        for turn in range(self.num_rounds):
            rank_N, slot_N = np.nonzero(counted_RK & (self.round_RK == turn))
            parent_N = self.parent_RK[rank_N, slot_N]
            sent_R, received_R = (np.bincount(each_N, minlength=len(ended_R)) for each_N in (parent_N, rank_N))
            end_N = np.maximum(ended_R[parent_N], ended_R[rank_N]) + np.maximum(sent_R[parent_N], received_R[rank_N])
            np.maximum.at(ended_R, parent_N, end_N)
            np.maximum.at(ended_R, rank_N, end_N)
        return int(ended_R.max(initial=0))

    def transfers_RR(self) -> IntArray:
        """Replicas that rank r sends to rank q."""
        num_ranks = len(self.parent_RK)
        sent_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        rank, slot = np.nonzero(self.parent_RK != EMPTY)
        np.add.at(sent_RR, (self.parent_RK[rank, slot], rank), 1)
        return sent_RR


def relay_tree(slots_RS: IntArray, home_slots: int, num_nodes: int = 1) -> RelayTree:
    """The tree of every replicated expert; see the module.

    Args:
        slots_RS: expert in each slot, homes first, EMPTY for none.
        home_slots: S, columns of homes.
        num_nodes: the ranks lie on this many nodes, consecutive ranks together.
    """
    num_ranks, num_slots = slots_RS.shape
    out = [np.full((num_ranks, num_slots - home_slots), EMPTY, dtype=np.int64) for _ in range(3)]
    parent_RK, parent_slot_RK, round_RK = out
    # Step 1: the holders of every expert, rank by rank, the expert with the most holders first.
    slot_of: dict[int, dict[int, int]] = {}  # expert -> rank -> column of the slot table
    rank_N, slot_N = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
    slot_N = slot_N + home_slots
    for expert, rank, slot in zip(slots_RS[rank_N, slot_N].tolist(), rank_N.tolist(), slot_N.tolist(), strict=True):
        slot_of.setdefault(expert, {})[rank] = slot
    homes = np.nonzero(np.isin(slots_RS[:, :home_slots], list(slot_of)))
    home_of = {int(slots_RS[rank, slot]): (int(rank), int(slot)) for rank, slot in zip(*homes, strict=True)}
    # Step 2: every home sends each of its replicated experts at least once.
    sends_R = [0] * num_ranks
    for rank, _ in home_of.values():
        sends_R[rank] += 1
    # Step 3: one expert's tree after the other.
    for expert in sorted(slot_of, key=lambda expert: (-len(slot_of[expert]), expert)):
        slots = slot_of[expert]
        home, home_slot = home_of[expert]
        sends_R[home] -= 1
        tree = _Tree(sends_R, num_ranks // num_nodes)
        tree.feed_nodes(home, list(slots))
        slots[home] = home_slot
        for parent, rank, turn in tree.transfers:
            slot = slots[rank] - home_slots
            parent_RK[rank, slot], parent_slot_RK[rank, slot], round_RK[rank, slot] = parent, slots[parent], turn
    return RelayTree(parent_RK=parent_RK, parent_slot_RK=parent_slot_RK, round_RK=round_RK, home_slots=home_slots)


class _Tree:
    """Builds the tree of one expert.

    Args:
        sends_R: transfers that each rank sends, of the experts so far; those of this one are added.
        per_node: ranks of a node.
    """

    def __init__(self, sends_R: list[int], per_node: int) -> None:
        self.sends_R, self.per_node = sends_R, per_node
        self.transfers: list[tuple[int, int, int]] = []  # (parent, rank, round)

    def feed_nodes(self, home: int, holders: Sequence[int]) -> None:
        """Feed one holder of every other node, then the other holders from inside their nodes."""
        by_node: dict[int, list[int]] = {}
        for rank in self._least_first(holders):
            by_node.setdefault(rank // self.per_node, []).append(rank)
        inside = by_node.pop(home // self.per_node, [])
        first = [ranks[0] for ranks in by_node.values()]
        rounds = self.feed(home, first, 0)
        self.feed(home, inside, rounds)
        for ranks in by_node.values():
            self.feed(ranks[0], ranks[1:], rounds)

    def feed(self, root: int, holders: Sequence[int], first_round: int) -> int:
        """Feed holders from a rank that has the weights, from a round on; returns the first round that is free."""
        left = len(holders).bit_length()  # rounds: ceil(log2(holders + 1))
        have, waiting = [root], list(holders)
        for turn in range(left):
            # As many must have the weights after this round as can be doubled to all of them in the rounds after it.
            needed = -(-(len(holders) + 1) // 2 ** (left - 1 - turn)) - len(have)
            for parent in self._least_first(have)[:needed]:
                rank = waiting.pop(0)
                self.sends_R[parent] += 1
                self.transfers.append((parent, rank, first_round + turn))
                have.append(rank)
        return first_round + left

    def _least_first(self, ranks: Sequence[int]) -> list[int]:
        return sorted(ranks, key=lambda rank: (self.sends_R[rank], rank))
