"""Where a layer's replicas may be: on the node of their home, or anywhere in the group where that is cheaper.

Replicas for exactly the tokens of a micro-batch are planned in both places where a node has too many tokens as a whole,
and the cheaper plan is taken (`exact_plan.py`). Replicas from history are searched for in one, that of the cheaper plan
for exactly the forecast, which takes a tenth of the search's time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_smartmoe.placement.exact_plan import ExactPlanOptions
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, plan_replicas
from megatron_smartmoe.placement.search.improve import ImprovedPlacement
from megatron_smartmoe.spec.arrays import FloatArray, IntArray


def cheapest_replicas(
    slots_RS: IntArray,
    scenarios_KE: FloatArray,
    home_slots: int,
    options: ReplicaOptions,
    rank_tokens: float,
    kernels: Kernels,
) -> ImprovedPlacement:
    """`plan_replicas` in the cheaper scope; see there for the arguments."""
    scope, kept_RS, num_ranks = options, slots_RS, len(slots_RS)
    if options.or_group and options.num_nodes > 1:
        # Step 1: the scope that is the cheaper one for the likeliest load.
        load_E = np.rint(scenarios_KE[0] * max(rank_tokens, 1.0) * num_ranks).astype(np.int64)
        judged = ExactPlanOptions(
            num_nodes=options.num_nodes, or_group=True, price=options.price, limit=1 + options.good_enough
        )
        num_nodes = kernels.exact_plan(load_E, slots_RS, home_slots, judged).num_nodes
        scope = replace(options, num_nodes=num_nodes)
        # Step 2: present replicas that have left their nodes are no part of a plan within nodes.
        kept_RS = slots_RS.copy()
        drop_misplaced(kept_RS, home_slots, np.arange(num_ranks) * num_nodes // num_ranks)
    given = (scenarios_KE, home_slots, scope, rank_tokens)
    return plan_replicas(kept_RS, *given, kernels.best, kernels.drop, kernels.busiest)
