"""Replicas for exactly the tokens of one micro-batch: the cheapest of the plans that may be.

A plan costs the tokens of the busiest rank and the transfers that follow one another, in tokens, as far as nothing
hides them (`cost.replicas.TransferPrice`). There are two ways to plan and two places for replicas. Each is tried only
where the ones before it leave more than a hundredth (`limit`) to save:

1. Homes that are even enough get no replicas.
2. `exact_replicas` balances to the token, without regard to transfers; `without_losing_replicas` drops those that do
   not pay.
3. `spilled_replicas` makes few large replicas, of whose transfers as few as possible follow one another.
4. Transfers inside a node are several times as fast as those between nodes, so replicas are planned within nodes. They
   cannot unload a node that has too many tokens as a whole. Where the busiest node has too many, both ways are tried
   over the whole group as well.

Example of the second place. 2 nodes of 2 ranks with 300, 300, 100 and 100 tokens. Within nodes nothing can be gained:
300. Over the group two replicas leave 200, and both travel at once: a transfer between nodes that costs 60 tokens makes
it 260, which is taken; one that costs 120 makes it 320, and the replicas stay within their nodes.

`num_nodes` may count the domains of a level above the nodes; replicas then stay in those.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import cost_of_replicas, without_losing_replicas
from megatron_smartmoe.placement.spilled_replicas import spilled_replicas
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY


@dataclass(frozen=True, kw_only=True)
class ExactPlanOptions:
    """Where replicas may be, and what they cost.

    Attributes:
        num_nodes: nodes of the group; a replica stays on its home's node. 1 lets it go anywhere.
        or_group: whether it may be anywhere in the group where that is cheaper.
        price: of the transfers, tokens of the busiest rank that take as long.
        limit: no replica is made, none leaves its node, and no second plan is made, while max / mean of the homes, of
            the nodes, or of a plan with its transfers, is at most this.
    """

    num_nodes: int = 1
    or_group: bool = False
    price: TransferPrice
    limit: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactPlan:
    """The plan.

    Attributes:
        slots_RS: homes and replicas.
        num_nodes: nodes that its replicas stay on; 1 where they were planned over the group.
    """

    slots_RS: IntArray
    num_nodes: int


def cheapest_exact_plan(load_E: IntArray, slots_RS: IntArray, home_slots: int, options: ExactPlanOptions) -> ExactPlan:
    """The cheapest plan for exactly these tokens; see the module.

    Args:
        load_E: tokens of each expert.
        slots_RS: the slots as they are; only the homes are read.
        home_slots: columns of homes, E / R.
        options: where replicas may be, and what they cost.

    Raises:
        PlanError: see `checks.check_replicas`.
    """
    num_ranks, tokens, homes_RH = len(slots_RS), int(load_E.sum()), slots_RS[:, :home_slots]
    bare_RS = slots_RS.copy()
    bare_RS[:, home_slots:] = EMPTY
    best, least = ExactPlan(slots_RS=bare_RS, num_nodes=options.num_nodes), float("inf")

    def is_good_enough(cost: float, parts: int = num_ranks) -> bool:
        return cost * parts <= options.limit * tokens

    # Step 1: homes that are balanced well enough.
    if is_good_enough(int(load_E[homes_RH].sum(axis=1).max(initial=0))):
        return best
    # Step 2: within nodes, and over the group where a node has too much as a whole; both ways to plan.
    load_N = load_E[homes_RH.reshape(options.num_nodes, -1)].sum(axis=1)
    anywhere = options.or_group and not is_good_enough(int(load_N.max()), options.num_nodes)
    for num_nodes in dict.fromkeys((options.num_nodes, 1) if anywhere else (options.num_nodes,)):
        for plan in (exact_replicas, spilled_replicas):
            planned_RS = plan(load_E, bare_RS, home_slots, num_nodes)
            paying_RS = without_losing_replicas(load_E[None], planned_RS, home_slots, options.price)
            cost = cost_of_replicas(load_E, paying_RS, home_slots, options.price)
            if cost < least:
                best, least = ExactPlan(slots_RS=paying_RS, num_nodes=num_nodes), cost
            if options.price.is_free or is_good_enough(cost):
                break  # the other way could save a hundredth at most
    return best
