"""The functions of this package that have compiled twins, in one object, so that a caller can pass those.

The twins return the same integers and are ten to fifty times as fast. They are torch ops, and this package imports no
torch: training passes them (`runtime.replicas.kernels`), and so do tools that find torch installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_smartmoe.cost.moe_layer import RelayedFlow
from megatron_smartmoe.placement.exact_plan import ExactPlan, ExactPlanOptions, cheapest_exact_plan
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import DropLosing, without_losing_replicas
from megatron_smartmoe.placement.plan_replicas import BestReplicas, best_replicas
from megatron_smartmoe.placement.relay import RelayTree, relay_tree
from megatron_smartmoe.placement.relayed_layer import relayed_layer
from megatron_smartmoe.placement.search.improve import ImprovedPlacement, improve
from megatron_smartmoe.placement.search.objective import Objective, Space
from megatron_smartmoe.placement.split import busiest_rank_tokens, min_max_split
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import BoolArray


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Numpy's functions, or their twins.

    Attributes:
        best: see `plan_replicas.best_replicas`.
        improve: see `search.improve.improve`, for a space in which homes move.
        drop: see `paying_replicas.without_losing_replicas`.
        exact: see `exact_replicas.exact_replicas`; arguments load_E, slots_RS, home_slots, num_nodes.
        exact_plan: see `exact_plan.cheapest_exact_plan`; arguments load_E, slots_RS, home_slots, options.
        split: see `split.min_max_split`; arguments counts_RE, hosts_ER.
        busiest: see `split.busiest_rank_tokens`.
        relay: see `relay.relay_tree`; arguments slots_RS, home_slots, num_nodes.
        flow: see `relayed_layer.relayed_layer`.
    """

    best: BestReplicas = best_replicas
    improve: Callable[[IntArray, FloatArray, Objective, Space], ImprovedPlacement] = improve
    drop: DropLosing = without_losing_replicas
    exact: Callable[[IntArray, IntArray, int, int], IntArray] = exact_replicas
    exact_plan: Callable[[IntArray, IntArray, int, ExactPlanOptions], ExactPlan] = cheapest_exact_plan
    split: Callable[[IntArray, BoolArray], IntArray] = min_max_split
    busiest: Callable[[BoolArray, IntArray], int] = busiest_rank_tokens
    relay: Callable[[IntArray, int, int], RelayTree] = relay_tree
    flow: Callable[[IntArray, IntArray, int, int, IntArray | None], RelayedFlow] = relayed_layer


NUMPY = Kernels()
