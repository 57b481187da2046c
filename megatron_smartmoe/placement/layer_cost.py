"""What a layer costs under a plan: the one price that planners, simulator and trainer compare placements by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, layer_time
from megatron_smartmoe.cost.replicas import EVERY_MICRO_BATCH, ReplicaSchedule
from megatron_smartmoe.placement.layer_plan import LayerPlan, evaluate
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
        relay: who sends which weights and gradients; None where homes send weights to all of their experts' replicas,
            and get the gradients back.
    """

    num_ranks: int
    num_nodes: int = 1
    constants: LayerConstants
    replicas: ReplicaSchedule = EVERY_MICRO_BATCH
    relay: Relay | None = None


def layer_seconds(pricing: LayerPricing) -> Callable[[IntArray, IntArray], float]:
    """The function (slots_RS, counts_RE) -> predicted seconds of a layer with the exact split, for the planners."""

    def seconds(slots_RS: IntArray, counts_RE: IntArray) -> float:
        home_slots = counts_RE.shape[1] // len(slots_RS)
        home_E = np.argsort(slots_RS[:, :home_slots].ravel(), kind="stable") // home_slots
        return price_layer(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE, home_E, pricing)[0]

    return seconds


def price_layer(plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, pricing: LayerPricing) -> tuple[float, float]:
    """Predicted seconds of the layer, and its max / mean tokens per rank (1 for a layer without tokens).

    Args:
        plan: slots and split.
        counts_RE: tokens of source rank r for expert e.
        home_E: rank of each expert's home, which sends weights to the expert's other hosts.
        pricing: ranks, nodes and constants.
    """
    # Step 1: where the tokens go.
    outcome = evaluate(plan, counts_RE, pricing.num_nodes)
    # Step 2: which ranks get a replica's weights from which home, or from another holder.
    hosts_ER = hosts_of(plan.slots_RS, counts_RE.shape[1])
    returned_RR, fetch_RR = direct_replicas(hosts_ER, home_E), None
    if pricing.relay is not None:
        fetch_RR, returned_RR = pricing.relay(home_E, hosts_ER)
    flow = LayerFlow(
        load_ER=outcome.load_ER,
        traffic_RR=outcome.traffic_RR,
        replicas_RR=returned_RR,
        num_nodes=pricing.num_nodes,
        fetch_RR=fetch_RR,
    )
    load_R = outcome.load_ER.sum(axis=0)
    imbalance = float(load_R.max() / load_R.mean()) if load_R.any() else 1.0
    assert imbalance >= 1 - 1e-9, f"a maximum below the mean: {load_R}"
    return layer_time(flow, pricing.constants, replicas=pricing.replicas).total_s, imbalance


def even_load_s(num_tokens: float, num_experts: int, pricing: LayerPricing) -> float:
    """Predicted seconds of the layer if every source rank sent as many tokens to each expert: what balancing aims at.

    No replica is needed then, so none is paid for. It is the force-balanced run that users compare with
    (Megatron's --moe-router-force-load-balancing), not a bound: tokens that stay on their rank would be faster still.
    """
    counts_RE = np.full((pricing.num_ranks, num_experts), num_tokens / (pricing.num_ranks * num_experts))
    homes_RS = np.arange(num_experts).reshape(pricing.num_ranks, -1)
    return layer_time(LayerFlow.equal_split(counts_RE, homes_RS, pricing.num_nodes), pricing.constants).total_s


def idle_replicas_s(slots_RS: IntArray, home_E: IntArray, pricing: LayerPricing) -> float:
    """Seconds that replicas cost a layer and micro-batch whose tokens do not use them."""
    hosts_ER = hosts_of(slots_RS, len(home_E))
    flow = LayerFlow(
        load_ER=np.zeros(hosts_ER.shape),
        traffic_RR=np.zeros((pricing.num_ranks, pricing.num_ranks)),
        replicas_RR=direct_replicas(hosts_ER, home_E),
        num_nodes=pricing.num_nodes,
    )
    return layer_time(flow, pricing.constants, replicas=pricing.replicas).replicas_s


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
