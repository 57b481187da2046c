"""Homes whose replicas take fewer transfers in a row: where links are slow, that is what a layer waits for.

Replicas even out any homes, but how many transfers have to follow one another depends on where the homes are. Several
hot experts on one rank leave through one port, and ranks that are below the mean without them take a replica that other
homes would have made unnecessary.

Method. With S transfers in a row an expert is on 2^S ranks at most. For S = 1 and 2 homes inside nodes are swapped, one
pair after the other in a fixed order, as long as that lowers the tokens of the busiest rank with the replicas that S
transfers can make. That objective falls with every useful swap, whereas the price itself only changes when the last
replica too many is gone. Of the homes that are found, and the present ones, the cheapest are taken: tokens of the
busiest rank and the price of the transfers.

Example. 32 experts of a recorded trace on 8 ranks, one of which has 3.9 times a rank's mean load; a layer on 8 A100
with PCIe links. With homes as numbered three transfers in a row balance the layer, at a price of 0.26 of the mean.
Three swaps later two do, at 0.12, which is what no plan can beat.

Alternatives: trying every pair and making the best swap finds as much, with ten times the plans; packing experts and
their replicas from scratch moves nearly every home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, is_many
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of

_WORTH = 0.01  # share of the mean load that a search must be able to save, and that other homes must save
_LEAST_GAIN = 0.002  # share of the mean load that a swap must take off the busiest rank
TRIALS, _TRIALS_OF_MANY = 256, 32  # plans of one search, and on many ranks, where each takes longer
_MOST_SWAPS = 12  # of one search
_STRIDE = 7919  # a prime: pairs are tried all over the table, not side by side
_NEVER = 1e15  # tokens


def homes_for_fewer_transfers(
    slots_RS: IntArray,
    load_E: IntArray,
    home_slots: int,
    options: ReplicaOptions,
    kernels: Kernels,
    trials: int | None = None,
) -> IntArray | None:
    """Slots with other homes and their replicas, or None where the present homes are as good.

    Args:
        slots_RS: homes and replicas as they are planned now.
        load_E: expected tokens of each expert, in as many micro-batches as a transfer serves.
        home_slots: columns of homes, E / R.
        options: where replicas may be, and their price.
        kernels: what plans.
        trials: plans of one search; None for a number that keeps its time in bounds.
    """
    if trials is None:
        trials = _TRIALS_OF_MANY if is_many(len(slots_RS)) else TRIALS
    layer = _Layer(load_E=load_E, home_slots=home_slots, options=options, kernels=kernels)
    mean = int(load_E.sum()) / len(slots_RS)
    # Step 1: a layer that is as good as even is not worth a search.
    if slots_RS.shape[1] == home_slots or layer.cost(slots_RS) <= (1 + _WORTH) * mean:
        return None
    # Step 2: search for each number of transfers in a row; compare at their price.
    best_RS, best = None, layer.cost(slots_RS)
    for in_a_row in (1, 2):
        homes_RS = layer.searched(slots_RS, in_a_row, trials)
        found_RS = layer.planned(homes_RS, options.price)
        if (cost := layer.cost(found_RS)) < best - _WORTH * mean:
            best_RS, best = found_RS, cost
    return best_RS


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer's load, and what plans and prices its replicas; see `homes_for_fewer_transfers`."""

    load_E: IntArray
    home_slots: int
    options: ReplicaOptions
    kernels: Kernels

    def planned(self, slots_RS: IntArray, price: TransferPrice) -> IntArray:
        """Replicas for these homes, as many as pay."""
        found_RS = self.kernels.exact(self.load_E, slots_RS, self.home_slots, self.options.num_nodes)
        return self.kernels.drop(self.load_E[None], found_RS, self.home_slots, price)

    def busiest(self, slots_RS: IntArray) -> int:
        """Tokens of the busiest rank."""
        return self.kernels.busiest(hosts_of(slots_RS, len(self.load_E)), self.load_E)

    def transfers(self, slots_RS: IntArray) -> float:
        """Price of the transfers, in tokens."""
        price = self.options.price
        return self.kernels.relay(slots_RS, self.home_slots, price.num_nodes).price_tokens(price)

    def cost(self, slots_RS: IntArray) -> float:
        """Both together."""
        return self.busiest(slots_RS) + self.transfers(slots_RS)

    def searched(self, slots_RS: IntArray, in_a_row: int, trials: int) -> IntArray:
        """Slots with homes that let so many transfers in a row balance the layer best; its replicas are left out."""
        price = _up_to(in_a_row, self.options.price.num_nodes)
        homes_RS = slots_RS.copy()
        homes_RS[:, self.home_slots :] = EMPTY
        mean = int(self.load_E.sum()) / len(slots_RS)
        first_N, second_N = self._pairs(slots_RS)
        least, swaps, since = self.busiest(self.planned(homes_RS, price)), 0, 0
        for trial in range(trials):
            if swaps == _MOST_SWAPS or since == len(first_N) or least <= mean * (1 + _LEAST_GAIN):
                break
            at = trial * _STRIDE % len(first_N)
            swapped_RS = homes_RS.copy()
            flat = swapped_RS.reshape(-1)
            flat[[first_N[at], second_N[at]]] = flat[[second_N[at], first_N[at]]]
            busiest, since = self.busiest(self.planned(swapped_RS, price)), since + 1
            if busiest < least - _LEAST_GAIN * mean:
                homes_RS, least, swaps, since = swapped_RS, busiest, swaps + 1, 0
        return homes_RS

    def _pairs(self, slots_RS: IntArray) -> tuple[IntArray, IntArray]:
        """Flat indices of two home slots on different ranks of one node, each pair once."""
        num_ranks, num_slots = slots_RS.shape
        flat_H = (np.arange(num_ranks)[:, None] * num_slots + np.arange(self.home_slots)).ravel()
        rank_H = flat_H // num_slots
        node_H = rank_H * self.options.num_nodes // num_ranks
        first, second = np.nonzero((rank_H[:, None] < rank_H) & (node_H[:, None] == node_H))
        return flat_H[first], flat_H[second]


def _up_to(in_a_row: int, num_nodes: int) -> TransferPrice:
    """A price that so many transfers in a row do not have, and more cannot pay."""
    leg = LegPrice(inside_tokens=_NEVER, between_tokens=_NEVER, hidden_tokens=in_a_row * _NEVER)
    return TransferPrice(fetch=leg, num_nodes=num_nodes)
