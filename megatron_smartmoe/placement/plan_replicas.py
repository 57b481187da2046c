"""The medium loop: which experts get replicas in the spare slots, planned from history, robust to forecast error.

Method. The plan is judged on scenarios (`History.scenarios_KE`): recent loads and perturbed forecasts. The present
replicas are improved by local search; when that is not good enough, a plan built afresh from the forecast
(`exact_replicas`) and improved the same way replaces it if it is better by more than its changes cost. So replicas
stay where they are as long as they balance the load, and a load that has jumped is not patched for ever.

On many ranks a search to the end would take too long. There the fresh plan's free slots are filled with replicas of the
experts that have the largest load per host, which makes it robust without a search (256 experts, 64 ranks, 2 spare
slots, a load that drifts by 5% a record: max / mean 1.001 instead of 1.016).

Alternatives: planning afresh each time (EPLB, UltraEP) is as good on average and brittle: the plan is perfect for the
last record only; local search alone gets stuck on patches of patches (1.07 instead of 1.01 for a drifting load on 64
ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.paying_replicas import DropLosing, without_losing_replicas
from megatron_smartmoe.placement.relay import RelayTree, relay_tree
from megatron_smartmoe.placement.search.cuts import ALL_SETS_UP_TO_RANKS, MEAN_LOAD, CutPool, scaled
from megatron_smartmoe.placement.search.improve import ImprovedPlacement, improve
from megatron_smartmoe.placement.search.objective import Objective, Space
from megatron_smartmoe.placement.split import busiest_rank_tokens
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of

_FEW_RANKS = 16  # up to here a search to the end takes a few milliseconds (measured: 2 ms for 32 experts on 16 ranks)
_PRICED_FOR_RANKS = 8  # on more than _FEW_RANKS ranks a replica costs replica_price times this over their number


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How replicas are planned.

    Attributes:
        num_nodes: nodes that the group's ranks lie on when replicas must stay on their home's node, else 1.
        or_group: whether a layer's replicas may be anywhere in the group where that is cheaper; read by
            `replica_scope`, not here.
        objective: what a plan is worth; its prices decide how many replicas there are and how often they change. The
            price of a replica is meant for about 8 ranks; on more than 16 it falls in proportion, because ranks
            receive their replicas side by side and each waits for its own only.
        good_enough: excess (mean and worst scenario together) up to which the improved replicas are kept without
            trying a fresh plan.
        effort: multiplies the candidates of each step; 1 is meant for every iteration of training.
        price: tokens of an iteration that take the busiest rank as long as the transfers of replicas take of it, out
            and back, hidden parts left out. A replica that saves less is not made; see `paying_replicas`. Where
            transfers are free every replica that improves the balance is made.
        may_suspend: whether `auto` makes none in a layer where plans from exact counts alone are cheaper; read by
            `replica_planner`, not here.
    """

    num_nodes: int = 1
    or_group: bool = False
    objective: Objective = field(default_factory=lambda: Objective(replica_price=1e-3, change_price=2e-5))
    good_enough: float = 0.01
    effort: int = 1
    price: TransferPrice = FREE_TRANSFERS
    may_suspend: bool = True

    @property
    def kept_nodes(self) -> int:
        """Nodes that no replica leaves, whatever the load; 1 where one may."""
        return 1 if self.or_group else self.num_nodes


class BestReplicas(Protocol):
    """`best_replicas`, or its compiled twin, which training uses: this package imports no torch."""

    def __call__(
        self, slots_RS: IntArray, scenarios_KE: FloatArray, home_slots: int, options: ReplicaOptions, /
    ) -> ImprovedPlacement:
        """See `best_replicas`."""


def best_replicas(
    slots_RS: IntArray, scenarios_KE: FloatArray, home_slots: int, options: ReplicaOptions
) -> ImprovedPlacement:
    """The best replicas, without regard to `price`; see `plan_replicas` for the arguments."""
    num_ranks, num_experts = len(slots_RS), scenarios_KE.shape[1]
    space, objective = search_space(num_ranks, home_slots, options), search_objective(num_ranks, options)
    many = is_many(num_ranks)
    # Step 1: improve the present replicas. On many ranks a step is slow: there both plans are only judged first, and
    # the better one is improved in step 4.
    first = replace(space, max_steps=0) if many else space
    pool = CutPool(num_ranks) if many else None  # the cuts that one search finds help the next
    kept = improve(slots_RS, scenarios_KE, objective, first, pool)
    if kept.excess <= options.good_enough or slots_RS.shape[1] == home_slots:
        return kept
    # Step 2: build a fresh plan for the likeliest load, and improve it the same way.
    load_E = scaled(scenarios_KE[:1], num_ranks)[0].astype(np.int64)
    fresh_RS = exact_replicas(load_E, slots_RS, home_slots, options.num_nodes, trials=0)  # has a search of its own
    if many:
        fresh_RS = fill_spare_slots(fresh_RS, load_E, space)
    fresh = improve(fresh_RS, scenarios_KE, objective, first, pool)
    # Step 3: take the better of the two, its replicas and changes priced.
    before_ER = hosts_of(slots_RS, num_experts)

    def cost(result: ImprovedPlacement) -> float:
        return result.excess + _price(result.slots_RS, before_ER, home_slots, objective)

    best = fresh if cost(fresh) < cost(kept) - objective.min_gain else kept
    if not many or best.excess <= options.good_enough:
        return best
    # Step 4: on many ranks, improve the plan that was chosen.
    return improve(best.slots_RS, scenarios_KE, objective, space, pool)


def plan_replicas(
    slots_RS: IntArray,
    scenarios_KE: FloatArray,
    home_slots: int,
    options: ReplicaOptions | None = None,
    rank_tokens: float = 0.0,
    best: BestReplicas = best_replicas,
    drop: DropLosing = without_losing_replicas,
    busiest: Callable[[BoolArray, IntArray], int] = busiest_rank_tokens,
) -> ImprovedPlacement:
    """New contents of the spare slots; homes stay.

    Args:
        slots_RS: the slots as they are.
        scenarios_KE: loads to plan for, one a row, the likeliest first (a fresh plan is built for that one).
        home_slots: columns of homes, E / R.
        options: prices and effort.
        rank_tokens: mean tokens per rank of an iteration, which the price is compared with.
        best: what finds them.
        drop: what drops those that do not pay.
        busiest: what judges what is left.
    """
    options = options or ReplicaOptions()
    # Step 1: the best replicas, priced in imbalance.
    found = best(slots_RS, scenarios_KE, home_slots, options)
    if options.price.is_free or not rank_tokens or (found.slots_RS[:, home_slots:] == EMPTY).all():
        return found
    # Step 2: drop those that cost more time than they save, on average over the scenarios.
    num_ranks = len(slots_RS)
    loads_KE = scaled(scenarios_KE, num_ranks).astype(np.int64)
    fewer_RS = drop(loads_KE, found.slots_RS, home_slots, options.price.scaled(MEAN_LOAD / rank_tokens))
    if np.array_equal(fewer_RS, found.slots_RS):
        return found
    return replace(found, slots_RS=fewer_RS, imbalance_K=_imbalance_K(fewer_RS, loads_KE, busiest))


def _imbalance_K(slots_RS: IntArray, loads_KE: IntArray, busiest: Callable[[BoolArray, IntArray], int]) -> FloatArray:
    """Max / mean tokens per rank in each scenario, split best."""
    hosts_ER = hosts_of(slots_RS, loads_KE.shape[1])
    bound_K = np.array([busiest(hosts_ER, load_E) for load_E in loads_KE])
    return np.asarray(bound_K * len(slots_RS) / np.maximum(loads_KE.sum(axis=1), 1))


def replicas_pay(
    slots_RS: IntArray,
    home_slots: int,
    saved_tokens: float,
    price: TransferPrice,
    relay: Callable[[IntArray, int, int], RelayTree] = relay_tree,
) -> bool:
    """Whether a layer's replicas take more off the busiest rank than their traffic costs.

    Args:
        slots_RS: homes and replicas.
        home_slots: columns of homes.
        saved_tokens: tokens that the replicas take off the busiest rank.
        price: of their transfers.
        relay: builds the trees that they travel along.
    """
    return saved_tokens > relay(slots_RS, home_slots, price.num_nodes).price_tokens(price)


def fill_spare_slots(slots_RS: IntArray, load_E: IntArray, space: Space) -> IntArray:
    """Fill the empty spare slots, those of the least loaded ranks first, each with a replica of the expert that has the
    largest load per host and may lie there."""
    filled_RS, allowed_ER = slots_RS.copy(), space.allowed_ER(slots_RS)
    hosts_ER = hosts_of(slots_RS, len(load_E))
    hosts_E = hosts_ER.sum(axis=1)
    load_R = np.zeros(len(slots_RS))
    for expert, each in enumerate(load_E / hosts_E):  # in this order, as in C++
        load_R[hosts_ER[expert]] += each
    for rank in np.argsort(load_R, kind="stable"):
        for slot in np.nonzero(filled_RS[rank] == EMPTY)[0]:
            may_E = allowed_ER[:, rank] & ~hosts_ER[:, rank]
            expert = int(np.argmax(np.where(may_E, load_E / hosts_E, -1.0)))
            if may_E[expert]:
                filled_RS[rank, slot] = expert
                hosts_ER[expert, rank] = True
                hosts_E[expert] += 1
    return filled_RS


def is_many(num_ranks: int) -> bool:
    """Whether a step of the search is slow."""
    return num_ranks > _FEW_RANKS


def search_objective(num_ranks: int, options: ReplicaOptions) -> Objective:
    """The objective with the price of a replica on this many ranks; see `ReplicaOptions`."""
    objective = options.objective
    if not is_many(num_ranks):
        return objective
    return replace(objective, replica_price=objective.replica_price * _PRICED_FOR_RANKS / num_ranks)


def search_space(num_ranks: int, home_slots: int, options: ReplicaOptions) -> Space:
    """Few candidates on many ranks, so that the time of a step stays in bounds; see `Space`."""
    node_R = np.arange(num_ranks) // (num_ranks // options.num_nodes)
    if num_ranks <= ALL_SETS_UP_TO_RANKS:  # every cut is known, a step takes a fraction of a millisecond
        return Space(home_slots=home_slots, node_R=node_R)
    if num_ranks <= _FEW_RANKS:
        return Space(home_slots=home_slots, node_R=node_R, max_steps=12 * options.effort, trials=2 * options.effort)
    return Space(
        home_slots=home_slots,
        node_R=node_R,
        max_steps=options.effort,
        max_experts=8 * options.effort,
        max_slots=16 * options.effort,
        trials=options.effort,
    )


def _price(slots_RS: IntArray, before_ER: BoolArray, home_slots: int, objective: Objective) -> float:
    """Price of the replicas, and of those that are new on their rank."""
    rank, slot = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
    expert = slots_RS[rank, slot + home_slots]
    return float(objective.replica_price * len(expert) + objective.change_price * (~before_ER[expert, rank]).sum())
