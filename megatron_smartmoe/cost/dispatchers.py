"""What each dispatcher sends: rows from rank to rank in a layer's mean exchange, in closed formulas.

    alltoall      a row for each chosen expert, from its source to the expert's rank
    hierarchical  --smartmoe-dispatch hierarchical: in two of a layer's four exchanges once between nodes for each token
                  and node, and through a gateway there; in the other two as alltoall (see `hierarchical`)
    allgather     every row to every rank, whatever it has chosen: each row enters a node once, over one of its G cards,
                  and is passed on inside (NCCL's hierarchical rings), so that a rank receives T / G rows of each rank
                  of another node, and on its own node T of each rank and what that rank has received
    flex          DeepEP, HybridEP, NCCL EP: a row once for each node with a chosen expert, to the rank of that node
                  with the source's place, which passes it on once to each rank with a chosen expert; results are added
                  up on the same way back

How many nodes and ranks a token has experts on is estimated from the counts (`hierarchical.rows_by_node`).

With padding to capacity (--moe-pad-expert-input-to-capacity) rows do not depend on what tokens choose: each source
sends every slot its capacity, and every rank computes as much as any other.

Planner, simulator, and in training the homes, the replicas and the pool price a layer through `moe_layer.layer_time`,
which reads this table, so that none of them balances traffic that the run does not have. `wire_rows` needs the flow
from rank to rank; two hops are counted in few numbers (`HopCounts`), since the planner prices each of thousands of
flows with them and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_domain
from megatron_smartmoe.cost.hierarchical import (
    HopCounts,
    mean_ports,
    more_rows_by_node,
    rows_by_node,
    rows_copied,
    to_gateways,
)
from megatron_smartmoe.spec.arrays import FloatArray

# --moe-token-dispatcher-type, and alltoall with --smartmoe-dispatch hierarchical
DispatcherName = Literal["alltoall", "hierarchical", "allgather", "flex"]
DISPATCHERS: tuple[DispatcherName, ...] = get_args(DispatcherName)


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A dispatcher, and what of the model decides how many rows it sends.

    Attributes:
        name: as in the table above.
        experts: E, that a token chooses from.
        top_k: K, experts of a token.
        padded_factor: the capacity factor that every expert's rows are padded to; 0 without padding.
        spare_slots: K of a rank, which are padded like home slots in a micro-batch with replicas.
    """

    name: DispatcherName = "alltoall"
    experts: int = 1
    top_k: int = 1
    padded_factor: float = 0.0
    spare_slots: int = 0


ALL_TO_ALL = Dispatcher()


def wire_rows(traffic_RR: FloatArray, num_nodes: int, dispatcher: Dispatcher) -> FloatArray | None:
    """Rows from rank to rank in each exchange, where the dispatcher sends others than one for each choice; else None.

    Args:
        traffic_RR: choices of source rank r whose expert is on rank q.
        num_nodes: nodes of the ranks.
        dispatcher: what sends them.
    """
    if dispatcher.name == "allgather":
        return _gathered(traffic_RR.sum(axis=1) / dispatcher.top_k, num_nodes)
    if dispatcher.name == "flex":
        return _once_per_node(traffic_RR, num_nodes, dispatcher)
    return None


def padded(
    load_ER: FloatArray, traffic_RR: FloatArray, dispatcher: Dispatcher, *, replicas: bool
) -> tuple[FloatArray, FloatArray]:
    """Tokens that ranks compute and get, where every slot gets its capacity from every source.

    Args:
        load_ER: tokens of expert e that rank r computes.
        traffic_RR: tokens that source rank r sends to rank q.
        dispatcher: with a factor.
        replicas: whether the micro-batch has any.
    """
    num_experts, num_ranks = load_ER.shape
    slots = num_experts // num_ranks + (dispatcher.spare_slots if replicas else 0)
    capacity_R = np.ceil(traffic_RR.sum(axis=1) / num_experts * dispatcher.padded_factor)
    return (
        np.repeat(np.eye(num_ranks), slots, axis=0) * capacity_R.sum(),
        np.repeat(capacity_R[:, None] * slots, num_ranks, axis=1),
    )


def _gathered(tokens_R: FloatArray, num_nodes: int) -> FloatArray:
    """Rows of an all-gather from rank to rank."""
    num_ranks = len(tokens_R)
    per_node = num_ranks // num_nodes
    node_R = np.arange(num_ranks) // per_node
    elsewhere_R = tokens_R.sum() - np.bincount(node_R, tokens_R)[node_R]  # of the ranks of other nodes
    same_RR = node_R[:, None] == node_R[None, :]
    rows_RR = np.where(same_RR, (tokens_R + elsewhere_R / per_node)[:, None], tokens_R[:, None] / per_node)
    np.fill_diagonal(rows_RR, 0.0)
    return rows_RR


def _once_per_node(traffic_RR: FloatArray, num_nodes: int, dispatcher: Dispatcher) -> FloatArray:
    """Rows between nodes once for each node, and inside once for each rank, from the rank that they arrive at."""
    num_ranks, experts, top_k = len(traffic_RR), dispatcher.experts, dispatcher.top_k
    choices_RN = traffic_RR.reshape(num_ranks, num_nodes, -1).sum(axis=2)
    once_RR = rows_by_node(traffic_RR, experts, top_k)  # each rank as a node of its own
    # [n, l, m, j]: from rank l of node n to rank j of node m; rank l of node m passes it on
    passed_NLL = once_RR.reshape(num_nodes, num_ranks // num_nodes, num_nodes, -1).sum(axis=0).transpose(1, 0, 2)
    inside_RR = np.zeros((num_nodes, passed_NLL.shape[1], num_nodes, passed_NLL.shape[2]))
    inside_RR[np.arange(num_nodes), :, np.arange(num_nodes), :] = passed_NLL
    own_RN = np.arange(num_ranks)[:, None] * num_nodes // num_ranks == np.arange(num_nodes)[None, :]
    between_RN = np.where(own_RN, 0.0, rows_by_node(choices_RN, experts, top_k))
    return np.asarray(to_gateways(between_RN) + inside_RR.reshape(num_ranks, num_ranks))


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a layer's mean exchange carries, in rows.

    Attributes:
        ports: the busiest ports inside nodes and between them.
        leaving: rows out of the busiest domain of each level above the nodes, over its ranks.
        copied: rows that the busiest rank copies in memory besides permuting, in all four exchanges.
    """

    ports: BusiestPorts
    leaving: tuple[float, ...]
    copied: float = 0.0


def carried(
    ports: BusiestPorts,
    leaving: tuple[float, ...],
    hops: HopCounts | None,
    dispatcher: Dispatcher,
    ranks_of_levels: Sequence[int] = (),
) -> Carried:
    """What the mean exchange of a layer carries.

    Args:
        ports: the busiest ports of an exchange in one hop.
        leaving: likewise out of the busiest domain of each level.
        hops: what two hops make of the flow; None on one node, where there is one.
        dispatcher: the dispatcher.
        ranks_of_levels: consecutive ranks of a domain of each level.
    """
    if dispatcher.name != "hierarchical" or hops is None:
        return Carried(ports=ports, leaving=leaving)
    once_RN = rows_by_node(hops.choices_RN, dispatcher.experts, dispatcher.top_k)
    gateways_RR = to_gateways(once_RN)
    return Carried(
        ports=mean_ports(ports, hops, once_RN),
        leaving=tuple(
            (rows + busiest_domain(gateways_RR, ranks)) / 2
            for rows, ranks in zip(leaving, ranks_of_levels, strict=False)
        ),
        copied=rows_copied(hops, once_RN),
    )


@dataclass(frozen=True, kw_only=True)
class RowShares:
    """Rows that one more choice adds to a layer's mean exchange, at an even load.

    Attributes:
        between: between nodes.
        inside: inside the node.
    """

    between: float
    inside: float


def rows_of_a_choice(dispatcher: Dispatcher, num_nodes: int) -> RowShares:
    """The exchanges' part in what a choice costs that homes may move to another node.

    Args:
        dispatcher: the dispatcher.
        num_nodes: nodes of the group.
    """
    # A gateway gets one more row only for a token without an expert on its node yet.
    once = (1 - 1 / num_nodes) * more_rows_by_node(1 / num_nodes, dispatcher.experts, dispatcher.top_k)
    return _mean_exchange(dispatcher, num_nodes, RowShares(between=once, inside=1.0))


def rows_at_a_rank(dispatcher: Dispatcher, num_nodes: int) -> RowShares:
    """The exchanges' part in what a choice costs the ports of the rank that computes it, which replicas may unburden.

    Args:
        dispatcher: the dispatcher.
        num_nodes: nodes of the group.
    """
    return _mean_exchange(dispatcher, num_nodes, RowShares(between=0.0, inside=1.0))


def _mean_exchange(dispatcher: Dispatcher, num_nodes: int, passed_on: RowShares) -> RowShares:
    """The mean over a layer's exchanges, where those through gateways carry `passed_on`.

    A gateway passes on a row for each choice; for flex that is too many, where two experts of a token share a rank.
    """
    away = 1 - 1 / num_nodes
    direct = RowShares(between=away, inside=1 - away)
    if dispatcher.padded_factor or dispatcher.name == "allgather":
        return RowShares(between=0.0, inside=0.0)  # what travels does not depend on the choices
    if dispatcher.name == "alltoall" or num_nodes == 1:
        return direct
    if dispatcher.name == "flex":
        return passed_on
    return RowShares(between=(direct.between + passed_on.between) / 2, inside=(direct.inside + passed_on.inside) / 2)
