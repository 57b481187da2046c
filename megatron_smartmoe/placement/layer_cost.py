"""What a layer costs under a plan: the cost model as the planners, the simulator and the trainer ask it."""

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
    """What prices a layer of one expert-parallel group.

    Attributes:
        num_ranks: R, ranks of the group.
        num_nodes: nodes that they are on.
        constants: seconds per count of the layer, from a cluster and an expert's shape.
    """

    num_ranks: int
    num_nodes: int = 1
    constants: LayerConstants


def layer_seconds(pricing: LayerPricing) -> Callable[[IntArray, IntArray], float]:
    """The cost model as the planners ask it: seconds of a layer under a slot table with the exact split."""

    def seconds(slots_RS: IntArray, counts_RE: IntArray) -> float:
        home_slots = counts_RE.shape[1] // len(slots_RS)
        home_E = np.argsort(slots_RS[:, :home_slots].ravel(), kind="stable") // home_slots
        return price_layer(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE, home_E, pricing)[0]

    return seconds


def price_layer(plan: LayerPlan, counts_RE: IntArray, home_E: IntArray, pricing: LayerPricing) -> tuple[float, float]:
    """Predicted seconds of the layer, and max / mean tokens per rank."""
    outcome = evaluate(plan, counts_RE, pricing.num_nodes)
    expert, rank = np.nonzero(hosts_of(plan.slots_RS, counts_RE.shape[1]))
    copy = rank != home_E[expert]
    replicas_RR = np.zeros((pricing.num_ranks, pricing.num_ranks))
    np.add.at(replicas_RR, (home_E[expert[copy]], rank[copy]), 1.0)
    flow = LayerFlow(
        load_ER=outcome.load_ER, traffic_RR=outcome.traffic_RR, replicas_RR=replicas_RR, num_nodes=pricing.num_nodes
    )
    load_R = outcome.load_ER.sum(axis=0)
    return layer_time(flow, pricing.constants).total_s, float(load_R.max() / max(load_R.mean(), 1e-300))
