"""The slow loop: which rank is each expert's home, changed by few swaps that each must pay.

Method. Units of balance are the ranks when there are no spare slots, and the nodes when there are: inside a node
replicas and the split even out the ranks, but a replica that must stay on its home's node cannot unload the node.
The swap of two experts between the busiest unit and another one that lowers the load most is made, then the next one,
as long as it gains more than its price: two experts' weights, main weights and moments, dearer between nodes than
within. Everything else stays where it is.

Where nodes are balanced, a swap's price can be what it takes over the links between them (`node_swap_price`): what the
busiest node has above the mean is computed by all of its ranks and crosses those same links in every micro-batch, so a
fraction of a percent pays for a swap, and as many swaps are made as pay, some for each node. Inside the nodes replicas
do the rest. Under group-limited routing whole groups are swapped (`routing_groups`).

Alternative: longest-processing-time from scratch (SmartMoE 2023, EPLB, MindSpeed) packs 2% better at best and, on
recorded training traces, moves 68 to 192 times more experts for it. It is kept as a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, Dispatcher, rows_of_a_choice
from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.placement.routing_groups import domains, group_swaps
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.placement import EMPTY

_OVERFLOW_WEIGHT = 0.1  # as in `search.objective`: lets a swap help although another unit is as busy
_ABOUT = 0.95  # of the best swap's gain
_RESOLUTION = 1e9  # steps per mean load: gains closer than one step are equal, so that rounding never decides
_STEPS_APART = 2.0  # of two gains that may be equal once they are rounded, one of them summed in another order
_LOADS_AT_ONCE = 1 << 22  # numbers of a block of swaps x units


@dataclass(frozen=True, kw_only=True)
class HomesOptions:
    """What a swap must gain.

    Attributes:
        num_nodes: nodes that the group's ranks lie on.
        replica_scope_is_node: replicas stay on the node of their home (only matters with spare slots).
        swap_price: price of a swap within a node, in mean loads of a unit: the imbalance that it must remove.
        between_nodes: how many times dearer a swap between nodes is.
        node_swap_price: price of a swap between nodes where they are the units of balance, in mean loads of a node;
            None for `between_nodes` times `swap_price`.
        max_swaps: most swaps of one layer and decision; where nodes are balanced, at least `swaps_per_node` for each.
        swaps_per_node: see `max_swaps`.
        num_groups: groups of group-limited routing, which stay whole; 1 for routing without.
    """

    num_nodes: int = 1
    replica_scope_is_node: bool = True
    swap_price: float = 0.01
    between_nodes: float = 2.0
    node_swap_price: float | None = None
    max_swaps: int = 8
    swaps_per_node: int = 16
    num_groups: int = 1

    @property
    def swap_between_nodes(self) -> float:
        """Price of a swap between nodes that are balanced."""
        return self.between_nodes * self.swap_price if self.node_swap_price is None else self.node_swap_price


def node_swap_price(
    constants: LayerConstants,
    rank_tokens: float,
    *,
    num_nodes: int,
    swap_s: float,
    worth_s: float,
    dispatcher: Dispatcher = ALL_TO_ALL,
) -> float:
    """The share of a node's mean load that a swap of two experts between nodes must take off the busiest one.

    Args:
        constants: seconds per count of the layer.
        rank_tokens: tokens of a rank in an iteration's micro-batches and one layer, if the load is even.
        num_nodes: nodes that the group's ranks lie on.
        swap_s: seconds that the swap takes.
        worth_s: seconds that a second saved in each iteration is worth once: horizon / margin.
        dispatcher: what sends the tokens.
    """
    rows = rows_of_a_choice(dispatcher, num_nodes)
    token_s = constants.token_s + rows.between * constants.inter_gpu_token_s + rows.inside * constants.intra_token_s
    saved_s = rank_tokens * token_s * worth_s
    return swap_s / saved_s if saved_s > 0 else HomesOptions.swap_price


@dataclass(frozen=True, kw_only=True)
class HomesPlan:
    """Slots after the swaps.

    Attributes:
        slots_RS: the new slots; replicas that no longer may lie where they were are cleared.
        swaps: pairs of experts that exchange their homes, in order.
    """

    slots_RS: IntArray
    swaps: tuple[tuple[int, int], ...]


def plan_homes(
    slots_RS: IntArray, load_E: FloatArray | IntArray, home_slots: int, options: HomesOptions | None = None
) -> HomesPlan:
    """Swap homes while that pays.

    Args:
        slots_RS: the slots as they are.
        load_E: expected load of each expert; only proportions matter.
        home_slots: columns of homes, E / R.
        options: nodes and prices of swaps.
    """
    options = options or HomesOptions()
    # Step 1: choose the units of balance: ranks, nodes, or one unit (nothing to do) where replicas reach every rank.
    num_ranks, num_slots = slots_RS.shape
    node_R = np.arange(num_ranks) // (num_ranks // options.num_nodes)
    has_spare = num_slots > home_slots
    by_node = has_spare and options.replica_scope_is_node
    options = options if by_node else replace(options, node_swap_price=None)
    unit_R = node_R if by_node else np.zeros(num_ranks, dtype=np.int64) if has_spare else np.arange(num_ranks)
    # Step 2: scale the loads so that the mean unit has load 1, the unit of the prices.
    load_E = np.asarray(load_E, dtype=np.float64)
    num_units = int(unit_R.max()) + 1
    load_E = load_E * (num_units / max(float(load_E.sum()), 1e-300))
    # Step 3: make the best swap until none pays.
    home_RH = slots_RS[:, :home_slots].copy()
    swaps: list[tuple[int, int]] = []
    most = max(options.max_swaps, options.swaps_per_node * num_units) if by_node else options.max_swaps
    load_U = _unit_loads(home_RH, load_E, unit_R, num_units)
    domain_R = domains(num_ranks, options.num_nodes, options.num_groups)
    ranks = _Ranks(unit_R=unit_R, node_R=node_R, domain_R=domain_R)
    while len(swaps) < most:
        swap_X2 = _best_swap(home_RH, load_E, load_U, ranks, options)
        if swap_X2 is None:
            break
        flat = home_RH.reshape(-1)
        flat[swap_X2] = flat[swap_X2[:, ::-1]]
        swaps += [(int(flat[second]), int(flat[first])) for first, second in swap_X2]
        load_U = _unit_loads(home_RH, load_E, unit_R, num_units)
    # Step 4: clear the replicas that the new homes displace.
    new_RS = np.concatenate([home_RH, slots_RS[:, home_slots:]], axis=1)
    drop_misplaced(new_RS, home_slots, node_R if by_node else np.zeros_like(node_R))
    return HomesPlan(slots_RS=new_RS, swaps=tuple(swaps))


def _unit_loads(home_RH: IntArray, load_E: FloatArray, unit_R: IntArray, num_units: int) -> FloatArray:
    return np.bincount(unit_R, weights=load_E[home_RH].sum(axis=1), minlength=num_units)


def _value(load_MU: FloatArray) -> FloatArray:
    """What a swap lowers: the busiest unit's overflow above the mean (which is 1), and a little of the others'."""
    overflow_MU = np.maximum(load_MU - 1.0, 0.0)
    return np.asarray(overflow_MU.max(axis=1) + _OVERFLOW_WEIGHT * overflow_MU.sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    """Where a home may be swapped to: the unit of balance, the node and the domain of each rank.

    Attributes:
        unit_R: what the loads are balanced over.
        node_R: decides the price of a swap.
        domain_R: single experts are swapped within.
    """

    unit_R: IntArray
    node_R: IntArray
    domain_R: IntArray


def _best_swap(
    home_RH: IntArray, load_E: FloatArray, load_U: FloatArray, ranks: _Ranks, options: HomesOptions
) -> IntArray | None:
    """The swap with the largest gain above its price: pairs of flat home slots that exchange their experts, `[X, 2]`.

    None where none gains.
    """
    found = _best_expert_swap(home_RH, load_E, load_U, ranks, options)
    if len(set(ranks.domain_R.tolist())) == 1 or options.num_groups < options.num_nodes:
        return None if found is None else found[1]
    rank_S = np.repeat(np.arange(len(home_RH)), home_RH.shape[1])
    load_S = load_E[home_RH.reshape(-1)]
    for swap_X2 in group_swaps(home_RH, load_E, ranks.node_R, options.num_groups):
        moved_X = load_S[swap_X2[:, 0]] - load_S[swap_X2[:, 1]]
        unit_X2 = ranks.unit_R[rank_S[swap_X2]]
        after_U = load_U - np.bincount(unit_X2[:, 0], moved_X, len(load_U))
        after_U += np.bincount(unit_X2[:, 1], moved_X, len(load_U))
        price = options.swap_between_nodes * len(swap_X2)
        gain = np.rint((_value(load_U[None]) - _value(after_U[None]) - price) * _RESOLUTION)[0]
        if gain > (0 if found is None else found[0]):
            found = float(gain), swap_X2
    return None if found is None else found[1]


def _best_expert_swap(
    home_RH: IntArray, load_E: FloatArray, load_U: FloatArray, ranks: _Ranks, options: HomesOptions
) -> tuple[float, IntArray] | None:
    """Of two experts in one domain, one of them on the busiest unit: the gain, and `[1, 2]` as in `_best_swap`."""
    # Every pair of a home slot of the busiest unit and one of another unit that holds a smaller load; of slots that are
    # alike in all that counts, the first.
    unit_R, domain_R = ranks.unit_R, ranks.domain_R
    num_ranks, home_slots = home_RH.shape
    load_S = load_E[home_RH.reshape(-1)]
    lands = num_ranks > len(load_U) > 1  # it matters which rank of a unit gets the expert
    slot_S = _first_of_their_kind(load_S, np.repeat(np.arange(num_ranks), home_slots), ranks, apart=lands)
    load_S, rank_S = load_S[slot_S], slot_S // home_slots
    busy_S = unit_R[rank_S] == int(load_U.argmax())
    busiest = np.flatnonzero(busy_S)
    allowed_SS = domain_R[rank_S[busiest], None] == domain_R[rank_S]
    row, second = np.nonzero(~busy_S & (load_S[busiest, None] > load_S) & allowed_SS)
    first = busiest[row]
    if not len(first):
        return None
    same_node_M = ranks.node_R[rank_S[first]] == ranks.node_R[rank_S[second]]
    price_M = np.where(same_node_M, options.swap_price, options.swap_between_nodes)
    moved_M, unit_M2 = load_S[first] - load_S[second], unit_R[rank_S[np.stack([first, second], axis=1)]]
    # The gain of each swap, which is rounded below, to within a step; those that cannot be chosen by then are left out.
    about_M = _value(load_U[None])[0] - _value_about(load_U, unit_M2, moved_M) - price_M
    most = float(about_M.max())
    near = np.flatnonzero(about_M >= (_ABOUT * most if lands and most > 0 else most) - _STEPS_APART / _RESOLUTION)
    # Loads of the units after each of them, a block at a time, and what the swap gains above its price.
    gain_N = np.empty(len(near))
    for part in np.array_split(np.arange(len(near)), -(-len(near) * len(load_U) // _LOADS_AT_ONCE)):
        load_NU, every, swap_N = load_U[None].repeat(len(part), axis=0), np.arange(len(part)), near[part]
        load_NU[every, unit_M2[swap_N, 0]] -= moved_M[swap_N]
        load_NU[every, unit_M2[swap_N, 1]] += moved_M[swap_N]
        gain_N[part] = np.rint((_value(load_U[None]) - _value(load_NU) - price_M[swap_N]) * _RESOLUTION)
    best = int(gain_N.argmax())
    if gain_N[best] <= 0:
        return None
    if lands:
        # Of the swaps that even out the nodes about as well, the one whose expert lands on the emptiest rank: several
        # hot experts on one rank are more than its node's spare slots can take off it.
        load_R = load_E[home_RH].sum(axis=1)
        landing_N = np.rint((load_R[rank_S[second]] + moved_M)[near] * _RESOLUTION)
        best = int(np.where(gain_N >= _ABOUT * gain_N[best], landing_N, np.inf).argmin())
    return float(gain_N[best]), slot_S[[[first[near[best]], second[near[best]]]]]


def _first_of_their_kind(load_S: FloatArray, rank_S: IntArray, ranks: _Ranks, *, apart: bool) -> IntArray:
    """The first of the home slots that have the same load, unit, node and domain (`apart`: and rank); ascending."""
    most = len(ranks.unit_R)  # units, nodes and domains
    place_R = (ranks.unit_R * most + ranks.node_R) * most + ranks.domain_R
    kind_R = np.arange(most) if apart else np.unique(place_R, return_inverse=True)[1]
    load_kind_S = np.unique(load_S, return_inverse=True)[1]
    first = np.unique(load_kind_S * most + kind_R[rank_S], return_index=True)[1]
    return np.sort(first)


def _value_about(load_U: FloatArray, unit_M2: IntArray, moved_M: FloatArray) -> FloatArray:
    """`_value` after each swap, the sum in another order.

    Args:
        load_U: loads of the units before.
        unit_M2: the busiest unit, and the other one.
        moved_M: load that moves from one to the other.
    """
    over_U = np.maximum(load_U - 1.0, 0.0)
    from_M, to_M = unit_M2.T
    after_from_M = np.maximum(load_U[from_M] - moved_M - 1.0, 0.0)
    after_to_M = np.maximum(load_U[to_M] + moved_M - 1.0, 0.0)
    # The largest of the units that the swap leaves alone: the second largest of all, or the third.
    largest = np.argsort(-over_U, kind="stable")[1:3]
    rest_M = np.where(to_M == largest[0], over_U[largest[1]] if len(largest) > 1 else 0.0, over_U[largest[0]])
    sum_M = over_U.sum() - over_U[from_M] - over_U[to_M] + after_from_M + after_to_M
    return np.asarray(np.maximum(np.maximum(after_from_M, after_to_M), rest_M) + _OVERFLOW_WEIGHT * sum_M)


def drop_misplaced(slots_RS: IntArray, home_slots: int, node_R: IntArray) -> None:
    """Clear, in place, replicas that now share a rank with their home or lie on another node than it."""
    home_node_E = np.empty(slots_RS[:, :home_slots].size, dtype=np.int64)
    home_node_E[slots_RS[:, :home_slots]] = node_R[:, None]
    for rank, row in enumerate(slots_RS):
        for slot in range(home_slots, len(row)):
            expert = row[slot]
            if expert != EMPTY and (expert in row[:home_slots] or home_node_E[expert] != node_R[rank]):
                row[slot] = EMPTY
