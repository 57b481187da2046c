"""Where a layer's replicas may be: on the node of their home, or anywhere in the group where that is cheaper.

Method. Transfers inside a node are several times as fast as those between nodes, so replicas are planned within nodes.
They cannot unload a node that has too many tokens as a whole. Where the busiest node has more than a hundredth above
the mean, replicas are planned over the whole group as well, and the cheaper plan is taken: tokens of the busiest rank,
and the transfers of both kinds that follow one another, as far as nothing hides them (`TransferPrice`). Elsewhere the
second search could save a hundredth at most, and is not made. Replicas from history are searched for in one scope, that
of the cheaper plan for exactly the forecast, which takes a tenth of the search's time.

Example. 2 nodes of 2 ranks with 300, 300, 100 and 100 tokens. Within nodes nothing can be gained: 300. Over the group
two replicas leave 200, and both travel at once: a transfer between nodes that costs 60 tokens makes it 260, which is
taken; one that costs 120 makes it 320, and the replicas stay within their nodes.

`num_nodes` may count the domains of a level above the nodes; replicas then stay in those.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.paying_replicas import paying_exact_replicas
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, plan_replicas
from megatron_smartmoe.placement.search.improve import ImprovedPlacement
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import hosts_of


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
        judged = (options.price, 1 + options.good_enough, kernels)
        num_nodes, _ = _cheaper_scope(load_E, slots_RS, home_slots, options.num_nodes, *judged)
        scope = replace(options, num_nodes=num_nodes)
        # Step 2: present replicas that have left their nodes are no part of a plan within nodes.
        kept_RS = slots_RS.copy()
        drop_misplaced(kept_RS, home_slots, np.arange(num_ranks) * num_nodes // num_ranks)
    given = (scenarios_KE, home_slots, scope, rank_tokens)
    return plan_replicas(kept_RS, *given, kernels.best, kernels.drop, kernels.busiest)


def cheapest_exact_replicas(
    load_E: IntArray,
    slots_RS: IntArray,
    home_slots: int,
    *,
    num_nodes: int,
    or_group: bool,
    price: TransferPrice,
    limit: float,
    kernels: Kernels,
) -> IntArray:
    """`paying_exact_replicas` in the cheaper scope; see there for the other arguments.

    Args:
        load_E: tokens of each expert.
        slots_RS: only the homes are read.
        home_slots: columns of homes, E / R.
        num_nodes: nodes of the group.
        or_group: whether replicas may be anywhere in the group where that is cheaper.
        price: of their transfers.
        limit: no replica is made, and none leaves its node, while max / mean of the homes, or of the nodes, is at most
            this.
        kernels: what plans.
    """
    if or_group and num_nodes > 1:
        return _cheaper_scope(load_E, slots_RS, home_slots, num_nodes, price, limit, kernels)[1]
    given = (load_E, slots_RS, home_slots, num_nodes, price, limit)
    return paying_exact_replicas(*given, kernels.exact, kernels.drop)


def _cheaper_scope(
    load_E: IntArray,
    slots_RS: IntArray,
    home_slots: int,
    num_nodes: int,
    price: TransferPrice,
    limit: float,
    kernels: Kernels,
) -> tuple[int, IntArray]:
    """Nodes that replicas stay on, or 1 for the whole group, and the replicas for exactly these tokens."""

    def planned(nodes: int) -> IntArray:
        given = (load_E, slots_RS, home_slots, nodes, price, limit)
        return paying_exact_replicas(*given, kernels.exact, kernels.drop)

    def cost(found_RS: IntArray) -> float:
        tree = kernels.relay(found_RS, home_slots, price.num_nodes)
        return float(kernels.busiest(hosts_of(found_RS, len(load_E)), load_E)) + tree.price_tokens(price)

    # Step 1: within nodes.
    near_RS = planned(num_nodes)
    # Step 2: over the group, where a node has too much as a whole.
    busiest = int(load_E[slots_RS[:, :home_slots].reshape(num_nodes, -1)].sum(axis=1).max())
    if busiest * num_nodes <= limit * int(load_E.sum()):
        return num_nodes, near_RS
    anywhere_RS = planned(1)
    # Step 3: take the cheaper one, in tokens of the busiest rank.
    return (1, anywhere_RS) if cost(anywhere_RS) < cost(near_RS) else (num_nodes, near_RS)
