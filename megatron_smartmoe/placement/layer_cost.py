"""What a layer costs under a plan: the one price that planners, simulator and trainer compare placements by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, Dispatcher
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, LayerTime, RelayedFlow, layer_time
from megatron_smartmoe.cost.replicas import EVERY_MICRO_BATCH, ReplicaSchedule
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_plan import LayerPlan, evaluate
from megatron_smartmoe.placement.relayed_layer import early_tokens, home_ranks
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray, hosts_of

# Home rank of each expert and the ranks that hold it -> experts whose weights rank r sends to rank q, and whose
# gradients come back that way, `[R, R]` each.
Relay = Callable[[IntArray, BoolArray], tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, kw_only=True)
class LayerPricing:
    """What the price of a layer depends on besides its plan and its counts.

    Attributes:
        num_ranks: R, ranks of the group.
        num_nodes: nodes that they are on.
        constants: seconds per count of the layer, from a cluster and an expert's shape.
        replicas: how often replicas travel, and what hides them.
        kept: the same for replicas from history in a micro-batch for which others are planned anew.
        relay: who sends which weights and gradients, for a peer's system that has a way of its own; None where homes
            send weights to all of their experts' replicas, and get the gradients back.
        has_trees: whether holders forward weights along relay trees, as training does; the plan's first columns are
            then homes.
        kernels: what splits the tokens and builds the trees.
        dispatcher: what sends the tokens.
    """

    num_ranks: int
    num_nodes: int = 1
    constants: LayerConstants
    replicas: ReplicaSchedule = EVERY_MICRO_BATCH
    kept: ReplicaSchedule = EVERY_MICRO_BATCH
    relay: Relay | None = None
    has_trees: bool = False
    kernels: Kernels = NUMPY
    dispatcher: Dispatcher = ALL_TO_ALL


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Replicas from history in a micro-batch for which others were planned anew: they were fetched all the same.

    Attributes:
        slots_RS: homes and replicas.
        returns: whether another micro-batch uses them, so that their gradients go home.
    """

    slots_RS: IntArray
    returns: bool = True


@dataclass(frozen=True, kw_only=True)
class PricedLayer:
    """The function (slots_RS, counts_RE) -> predicted seconds of a layer with the exact split, for the planners.

    Attributes:
        pricing: of the replicas that the mode plans.
        alone: with `auto`, of those planned from exact counts alone, where replicas from history are suspended.
    """

    pricing: LayerPricing
    alone: LayerPricing | None = None

    def __call__(self, slots_RS: IntArray, counts_RE: IntArray) -> float:
        """Seconds of a micro-batch with these slots and counts."""
        return self.terms(slots_RS, counts_RE).total_s

    def terms(self, slots_RS: IntArray, counts_RE: IntArray) -> LayerTime:
        """The seconds, by what takes them."""
        home_E = home_ranks(slots_RS, counts_RE.shape[1] // len(slots_RS))
        return _layer_time(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE, home_E, self.pricing)[0]


def layer_seconds(pricing: Mapping[str, LayerPricing], mode: str) -> PricedLayer:
    """What prices a layer for the planners.

    Args:
        pricing: price of a layer by the way that replicas are planned.
        mode: one of them.
    """
    return PricedLayer(pricing=pricing[mode], alone=pricing["exact"] if mode == "auto" else None)


def price_layer(
    plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, pricing: LayerPricing, kept: Kept | None = None
) -> tuple[float, float]:
    """Predicted seconds of the layer, and its max / mean tokens per rank; see `_layer_time`."""
    time, imbalance = _layer_time(plan, counts_RE, home_E, pricing, kept)
    return time.total_s, imbalance


def _layer_time(
    plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, pricing: LayerPricing, kept: Kept | None = None
) -> tuple[LayerTime, float]:
    """Predicted time of the layer, and its max / mean tokens per rank (1 for a layer without tokens).

    Args:
        plan: slots and split.
        counts_RE: tokens of source rank r for expert e.
        home_E: rank of each expert's home, which sends weights to the expert's other hosts.
        pricing: ranks, nodes and constants.
        kept: the replicas from history, where the plan was made anew for this micro-batch.
    """
    flow: LayerFlow | RelayedFlow
    if pricing.has_trees and plan.split == "exact" and not pricing.dispatcher.padded_factor:
        flow = _relayed(plan.slots_RS, counts_RE, pricing, kept)
        load_R = flow.tokens_R
    else:
        flow = _by_expert(plan, counts_RE, home_E, pricing, kept)
        load_R = flow.load_ER.sum(axis=0)
    imbalance = float(load_R.max() / load_R.mean()) if load_R.any() else 1.0
    assert imbalance >= 1 - 1e-9, f"a maximum below the mean: {load_R}"
    time = layer_time(
        flow, pricing.constants, replicas=pricing.replicas, kept=pricing.kept, dispatcher=pricing.dispatcher
    )
    return time, imbalance


def _relayed(slots_RS: IntArray, counts_RE: IntArray, pricing: LayerPricing, kept: Kept | None) -> RelayedFlow:
    """The flow with the exact split and relay trees."""
    home_slots = counts_RE.shape[1] // len(slots_RS)
    kept_RS = None if kept is None else kept.slots_RS
    flow = pricing.kernels.flow(counts_RE, slots_RS, home_slots, pricing.num_nodes, kept_RS)
    return flow if kept is None or kept.returns else replace(flow, kept_returns=False)


def _by_expert(
    plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, pricing: LayerPricing, kept: Kept | None
) -> LayerFlow:
    """The flow with any split and way of the replicas."""
    # Step 1: where the tokens go.
    outcome = evaluate(plan, counts_RE, pricing.num_nodes, pricing.kernels.split)
    # Step 2: which ranks get a replica's weights from which home, or from another holder.
    if pricing.has_trees:
        return relayed_flow(
            plan.slots_RS, outcome.load_ER, outcome.traffic_RR, pricing.num_nodes, pricing.kernels, kept
        )
    hosts_ER = hosts_of(plan.slots_RS, counts_RE.shape[1])
    returned_RR, fetch_RR = direct_replicas(hosts_ER, home_E), None
    if pricing.relay is not None:
        fetch_RR, returned_RR = pricing.relay(home_E, hosts_ER)
    return LayerFlow(
        load_ER=outcome.load_ER,
        traffic_RR=outcome.traffic_RR,
        replicas_RR=returned_RR,
        num_nodes=pricing.num_nodes,
        fetch_RR=fetch_RR,
        early_tokens=early_tokens(outcome.load_ER, home_E, hosts_ER),
    )


def even_load_s(num_tokens: float, num_experts: int, pricing: LayerPricing) -> float:
    """Predicted seconds of the layer if every source rank sent as many tokens to each expert: what balancing aims at.

    No replica is needed then, so none is paid for. It is the force-balanced run that users compare with
    (Megatron's --moe-router-force-load-balancing), not a bound: tokens that stay on their rank would be faster still.
    """
    flow = even_load(num_tokens, num_experts, pricing)
    return layer_time(flow, pricing.constants, dispatcher=pricing.dispatcher).total_s


def even_load(num_tokens: float, num_experts: int, pricing: LayerPricing) -> LayerFlow:
    """The flow of that layer."""
    num_ranks = pricing.num_ranks
    counts_RE = np.full((num_ranks, num_experts), num_tokens / (num_ranks * num_experts))
    is_home_ER = _is_home(num_ranks, num_experts)
    return LayerFlow(
        load_ER=counts_RE.sum(axis=0)[:, None] * is_home_ER,
        traffic_RR=counts_RE @ is_home_ER,
        replicas_RR=np.zeros((num_ranks, num_ranks)),
        num_nodes=pricing.num_nodes,
    )


@functools.lru_cache(maxsize=4)
def _is_home(num_ranks: int, num_experts: int) -> FloatArray:
    """1 where an expert is at home in logical order, else 0, `[E, R]`."""
    return np.repeat(np.eye(num_ranks), num_experts // num_ranks, axis=0)


def relayed_flow(
    slots_RS: IntArray,
    load_ER: FloatArray,
    traffic_RR: FloatArray,
    num_nodes: int,
    kernels: Kernels = NUMPY,
    kept: Kept | None = None,
) -> LayerFlow:
    """The flow of a layer whose replicas travel along relay trees, as in training.

    Args:
        slots_RS: homes, E / R columns of them, and replicas.
        load_ER: tokens of expert e that rank r computes.
        traffic_RR: tokens from source rank to rank.
        num_nodes: nodes that the ranks lie on.
        kernels: what builds the trees.
        kept: the replicas from history, where these were planned anew for one micro-batch.
    """
    num_experts, num_ranks = load_ER.shape
    home_slots = num_experts // num_ranks
    tree = kernels.relay(slots_RS, home_slots, num_nodes)
    home_E = home_ranks(slots_RS, home_slots)
    return LayerFlow(
        load_ER=load_ER,
        traffic_RR=traffic_RR,
        replicas_RR=tree.transfers_RR().astype(np.float64),
        num_nodes=num_nodes,
        replica_steps=tree.steps_by_link(num_nodes),
        early_tokens=early_tokens(load_ER, home_E, hosts_of(slots_RS, num_experts)),
        kept_steps=(0, 0)
        if kept is None
        else kernels.relay(kept.slots_RS, home_slots, num_nodes).steps_by_link(num_nodes),
        kept_returns=kept is None or kept.returns,
    )


def migration_s(before_E: IntArray, after_E: IntArray, num_ranks: int, state_bytes: int, bytes_s: float) -> float:
    """Seconds until the busiest rank has sent and received the state of the experts that move.

    Args:
        before_E: home rank of each expert.
        after_E: the same after the move.
        num_ranks: R.
        state_bytes: of one expert: weights, main weights and moments.
        bytes_s: bandwidth of a rank in each direction.
    """
    moves_E = before_E != after_E
    sent_R = np.bincount(before_E[moves_E], minlength=num_ranks)
    received_R = np.bincount(after_E[moves_E], minlength=num_ranks)
    return float(np.maximum(sent_R, received_R).max()) * state_bytes / bytes_s


def direct_replicas(hosts_ER: BoolArray, home_E: IntArray) -> FloatArray:
    """Replicas that home rank r feeds on rank q, `[R, R]`."""
    expert, rank = np.nonzero(hosts_ER)
    away = rank != home_E[expert]
    replicas_RR = np.zeros((hosts_ER.shape[1], hosts_ER.shape[1]))
    np.add.at(replicas_RR, (home_E[expert[away]], rank[away]), 1.0)
    return replicas_RR
