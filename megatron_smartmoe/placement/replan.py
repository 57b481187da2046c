"""When `auto` plans a layer anew for one micro-batch: the rule that training and the simulator both call.

Replicas from history are fetched early, once for all micro-batches of an iteration, and cannot know a burst. So when
the counts of a micro-batch are known, each layer is judged by them:

1. The replicas from history serve the micro-batch if they balance it well enough (`limit`).
2. Otherwise replicas are planned for exactly these counts. They replace those from history, for this micro-batch
   alone, if the tokens that they take off its busiest rank are worth more than their transfers. Those from history
   have been fetched already, so they cost nothing more whether they are used or not.

The rule sees counts and slots only, no clock: every rank, a recomputed forward pass and a replay decide the same.

Example. 4 ranks, mean 100 tokens per rank, limit 1.01, a transfer costs 45 tokens. With the replicas from history the
busiest rank has 180 tokens, which is above 101; exact ones would leave 100. One new replica costs 45 < 180 - 100, so
the layer is planned anew; two of one expert, whose second transfer follows the first, would cost 90 > 80.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.placement.decisions import MOST_CANDIDATES, Candidate, Decision, digest_of
from megatron_smartmoe.placement.plan_replicas import replicas_pay
from megatron_smartmoe.placement.relay import RelayTree, relay_tree
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


class PlannedAnew(Protocol):
    """Replicas for exactly the counts of one micro-batch, with their split."""

    @property
    def slots_RS(self) -> IntArray:
        """Homes and replicas; experts are numbered as the caller numbers them."""

    @property
    def busiest(self) -> int:
        """Tokens of the busiest rank."""


@dataclass(frozen=True, kw_only=True)
class ReplanOptions:
    """When a layer is planned anew.

    Attributes:
        limit: max / mean tokens per rank up to which the replicas from history are good enough.
        price: of the transfers of replicas that serve one micro-batch, weights out and gradients back.
    """

    limit: float
    price: TransferPrice = FREE_TRANSFERS


def planned_anew[P: PlannedAnew](
    busiest: int,
    load_E: IntArray,
    num_ranks: int,
    options: ReplanOptions,
    plan: Callable[[], P],
    relay: Callable[[IntArray, int, int], RelayTree] = relay_tree,
) -> P | None:
    """The layer's plan for exactly this micro-batch, or None where the replicas from history stay.

    Args:
        busiest: tokens of the busiest rank with the replicas from history, split best.
        load_E: tokens of each expert in the micro-batch.
        num_ranks: R.
        options: when to plan anew.
        plan: plans the layer for exactly these counts; called only where history falls short.
        relay: builds the trees that replicas travel along.
    """
    # Step 1: replicas from history that balance the layer well enough stay.
    if busiest * num_ranks <= options.limit * int(load_E.sum()):
        return None
    # Step 2: others replace them if they save more than they cost.
    anew = plan()
    saved_tokens = busiest - anew.busiest
    pays = saved_tokens > 0 and replicas_pay(
        anew.slots_RS, len(load_E) // num_ranks, saved_tokens, options.price, relay
    )
    return anew if pays else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Replan:
    """A layer that was planned anew for one micro-batch.

    Attributes:
        layer: row of the layer in the placement.
        micro_batch: number of the micro-batch in its iteration, among those in which the layer has tokens.
        load_E: tokens of each expert.
        slots_RS: homes and replicas.
        before_tokens: tokens of the busiest rank with the replicas from history.
        tokens: the same with these.
    """

    layer: int
    micro_batch: int
    load_E: IntArray
    slots_RS: IntArray
    before_tokens: int
    tokens: int

    def candidates(self, price: TransferPrice) -> tuple[Candidate, ...]:
        """As they are logged: to plan anew at this price, and to keep the replicas from history."""
        where = f"layer {self.layer + 1}, micro-batch {self.micro_batch + 1}"
        home_slots = len(self.load_E) // len(self.slots_RS)
        kept_RS = self.slots_RS.copy()
        kept_RS[:, home_slots:] = EMPTY  # those from history have been fetched
        both = (
            (True, "planned anew", self.tokens, self.slots_RS),
            (False, "from history", self.before_tokens, kept_RS),
        )
        return tuple(
            Candidate.in_tokens(
                f"{where}: replicas {name}",
                chosen=chosen,
                layer=self.layer,
                busiest_tokens=tokens,
                tree=relay_tree(slots_RS, home_slots, price.num_nodes),
                price=price,
            )
            for chosen, name, tokens, slots_RS in both
        )


def replans_decision(
    iteration: int, group: int, history: str, replans: Sequence[Replan], judged: int, price: TransferPrice
) -> Decision:
    """What `auto` decided in one iteration, as it is logged.

    Args:
        iteration: the iteration, which has ended.
        group: the expert-parallel group.
        history: digest of the placement with the replicas from history.
        replans: the layers and micro-batches that were planned anew, by layer, then micro-batch.
        judged: layers and micro-batches with tokens.
        price: see `ReplanOptions`.
    """
    most = sorted(replans, key=lambda one: one.tokens - one.before_tokens)[: MOST_CANDIDATES // 2]
    places = np.array([(one.layer, one.micro_batch) for one in replans], dtype=np.int64)
    return Decision(
        iteration=iteration,
        kind="replans",
        group=group,
        inputs=digest_of(places, *(one.load_E for one in replans)),
        before=history,
        after=digest_of(places, *(one.slots_RS for one in replans)),
        taken=True,
        why=f"{len(replans)} of {judged} layers and micro-batches planned anew from their own counts",
        changes=(),
        candidates=tuple(candidate for one in most for candidate in one.candidates(price)),
        price_tokens=price.each_tokens,
    )
