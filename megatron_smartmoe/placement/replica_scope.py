"""Where a layer's replicas may be: on the node of their home, or anywhere in the group where that is cheaper.

Method. Transfers inside a node are several times as fast as those between nodes, so replicas are planned within nodes.
They cannot unload a node that has too many tokens as a whole. Where the busiest node has more than a hundredth above
the mean, replicas are planned over the whole group as well, and the cheaper plan is taken: tokens of the busiest rank,
and the transfers of both kinds that follow one another, as far as nothing hides them (`TransferPrice`). Elsewhere the
second search could save a hundredth at most, and is not made.

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

    def planned(start_RS: IntArray, within: ReplicaOptions) -> ImprovedPlacement:
        given = (scenarios_KE, home_slots, within, rank_tokens)
        return plan_replicas(start_RS, *given, kernels.best, kernels.drop, kernels.busiest)

    if not options.or_group or options.num_nodes == 1:
        return planned(slots_RS, options)

    def cost(found: ImprovedPlacement) -> float:
        tree = kernels.relay(found.slots_RS, home_slots, options.price.num_nodes)
        return float(found.imbalance_K.mean()) * rank_tokens + tree.price_tokens(options.price)

    def near() -> ImprovedPlacement:
        kept_RS, num_ranks = slots_RS.copy(), len(slots_RS)  # present replicas that have left their nodes are no part
        drop_misplaced(kept_RS, home_slots, np.arange(num_ranks) * options.num_nodes // num_ranks)
        return planned(kept_RS, options)

    # Step 1: within nodes, where no node has too much as a whole, on average over the scenarios.
    busiest_K = _node_loads(scenarios_KE, slots_RS, home_slots, options.num_nodes).max(axis=1)
    excess = float((busiest_K * options.num_nodes / np.maximum(scenarios_KE.sum(axis=1), 1e-300)).mean()) - 1.0
    if not rank_tokens or excess <= options.good_enough:
        return near()
    # Step 2: elsewhere over the group; that is all where it is cheaper than any plan within nodes can be.
    anywhere = planned(slots_RS, replace(options, num_nodes=1))
    if cost(anywhere) < (1 + excess) * rank_tokens:
        return anywhere
    # Step 3: else within nodes too; take the cheaper one, in tokens of the busiest rank in an iteration.
    return min(near(), anywhere, key=cost)


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

    def planned(nodes: int) -> IntArray:
        return paying_exact_replicas(load_E, slots_RS, home_slots, nodes, price, limit, kernels.exact, kernels.drop)

    # Step 1: within nodes.
    near_RS = planned(num_nodes)
    if not or_group or num_nodes == 1:
        return near_RS
    # Step 2: over the group, where a node has too much as a whole.
    busiest = int(_node_loads(load_E[None], slots_RS, home_slots, num_nodes).max())
    if busiest * num_nodes <= limit * int(load_E.sum()):
        return near_RS
    anywhere_RS = planned(1)

    # Step 3: take the cheaper one, in tokens of the busiest rank.
    def cost(found_RS: IntArray) -> float:
        tree = kernels.relay(found_RS, home_slots, price.num_nodes)
        return float(kernels.busiest(hosts_of(found_RS, len(load_E)), load_E)) + tree.price_tokens(price)

    return anywhere_RS if cost(anywhere_RS) < cost(near_RS) else near_RS


def _node_loads[T: (FloatArray, IntArray)](loads_KE: T, slots_RS: IntArray, home_slots: int, num_nodes: int) -> T:
    """Load of the homes of each node, `[K, N]`."""
    homes_NH = slots_RS[:, :home_slots].reshape(num_nodes, -1)
    return loads_KE[:, homes_NH].sum(axis=2)
