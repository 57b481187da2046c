"""What a layer costs under a plan: the one price that planners, simulator and trainer compare placements by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, layer_time
from megatron_smartmoe.placement.layer_plan import LayerPlan, evaluate
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of


@dataclass(frozen=True, kw_only=True)
class LayerPricing:
    """What the price of a layer depends on besides its plan and its counts.

    Attributes:
        num_ranks: R, ranks of the group.
        num_nodes: nodes that they are on.
        constants: seconds per count of the layer, from a cluster and an expert's shape.
    """

    num_ranks: int
    num_nodes: int = 1
    constants: LayerConstants


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
    expert, rank = np.nonzero(hosts_of(plan.slots_RS, counts_RE.shape[1]))
    # Step 2: which ranks get a replica's weights from which home.
    replica = rank != home_E[expert]
    replicas_RR = np.zeros((pricing.num_ranks, pricing.num_ranks))
    np.add.at(replicas_RR, (home_E[expert[replica]], rank[replica]), 1.0)
    flow = LayerFlow(
        load_ER=outcome.load_ER, traffic_RR=outcome.traffic_RR, replicas_RR=replicas_RR, num_nodes=pricing.num_nodes
    )
    load_R = outcome.load_ER.sum(axis=0)
    imbalance = float(load_R.max() / load_R.mean()) if load_R.any() else 1.0
    assert imbalance >= 1 - 1e-9, f"a maximum below the mean: {load_R}"
    return layer_time(flow, pricing.constants).total_s, imbalance
