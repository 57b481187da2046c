"""What each of Megatron's dispatchers sends: rows from rank to rank in a layer's mean exchange, in closed formulas.

    alltoall     a row for each chosen expert, from its source to the expert's rank
    allgather    every row to every rank, whatever it has chosen: each row enters a node once, over one of its G cards,
                 and is passed on inside (NCCL's hierarchical rings), so that a rank receives T / G rows of each rank
                 of another node, and on its own node T of each rank and what that rank has received
    flex         DeepEP, HybridEP, NCCL EP: a row once for each node with a chosen expert, to the rank of that node with
                 the source's place, which passes it on once to each rank with a chosen expert; results are added up
                 on the same way back

Of the exchanges of a layer (dispatch, combine, and the gradient of each) all four are of this size. How many nodes and
ranks a token has experts on is estimated from the counts (`hierarchical.rows_by_node`).

With padding to capacity (--moe-pad-expert-input-to-capacity) rows do not depend on what tokens choose: each source
sends every slot its capacity, and every rank computes as much as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from megatron_smartmoe.cost.hierarchical import rows_by_node, to_gateways
from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.spec.arrays import FloatArray

DispatcherName = Literal["alltoall", "allgather", "flex"]  # --moe-token-dispatcher-type
DISPATCHERS: tuple[DispatcherName, ...] = get_args(DispatcherName)


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """One of Megatron's dispatchers, and what of the model decides how many rows it sends.

    Attributes:
        name: as --moe-token-dispatcher-type has it.
        top_k: K, experts of a token.
        padded_factor: the capacity factor that every expert's rows are padded to; 0 without padding.
        spare_slots: K of a rank, which are padded like home slots in a micro-batch with replicas.
    """

    name: DispatcherName = "alltoall"
    top_k: int = 1
    padded_factor: float = 0.0
    spare_slots: int = 0


ALL_TO_ALL = Dispatcher()


def on_the_wire(flow: LayerFlow, dispatcher: Dispatcher) -> LayerFlow:
    """A flow, with the rows that a dispatcher sends for it, and those that ranks compute if it pads.

    Args:
        flow: tokens from source to the ranks of their experts, one for each choice.
        dispatcher: what sends them.
    """
    if dispatcher.padded_factor:
        flow = _padded(flow, dispatcher)
    if dispatcher.name == "allgather":
        return replace(flow, wire_RR=_gathered(flow.traffic_RR.sum(axis=1) / dispatcher.top_k, flow.num_nodes))
    if dispatcher.name == "flex":
        return replace(flow, wire_RR=_once_per_node(flow, dispatcher.top_k))
    return flow


def _padded(flow: LayerFlow, dispatcher: Dispatcher) -> LayerFlow:
    """Every slot gets its capacity from every source."""
    num_experts, num_ranks = flow.load_ER.shape
    slots = num_experts // num_ranks + (dispatcher.spare_slots if flow.replicas_RR.any() else 0)
    capacity_R = np.ceil(flow.traffic_RR.sum(axis=1) / num_experts * dispatcher.padded_factor)
    return replace(
        flow,
        load_ER=np.repeat(np.eye(num_ranks), slots, axis=0) * capacity_R.sum(),
        traffic_RR=np.repeat(capacity_R[:, None] * slots, num_ranks, axis=1),
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


def _once_per_node(flow: LayerFlow, top_k: int) -> FloatArray:
    """Rows between nodes once for each node, and inside once for each rank, from the rank that they arrive at."""
    num_ranks, num_nodes, num_experts = len(flow.traffic_RR), flow.num_nodes, len(flow.load_ER)
    choices_RN = flow.traffic_RR.reshape(num_ranks, num_nodes, -1).sum(axis=2)
    once_RR = rows_by_node(flow.traffic_RR, num_experts, top_k)  # each rank as a node of its own
    # [n, l, m, j]: from rank l of node n to rank j of node m; rank l of node m passes it on
    passed_NLL = once_RR.reshape(num_nodes, num_ranks // num_nodes, num_nodes, -1).sum(axis=0).transpose(1, 0, 2)
    inside_RR = np.zeros((num_nodes, passed_NLL.shape[1], num_nodes, passed_NLL.shape[2]))
    inside_RR[np.arange(num_nodes), :, np.arange(num_nodes), :] = passed_NLL
    own_RN = np.arange(num_ranks)[:, None] * num_nodes // num_ranks == np.arange(num_nodes)[None, :]
    between_RN = np.where(own_RN, 0.0, rows_by_node(choices_RN, num_experts, top_k))
    return np.asarray(to_gateways(between_RN) + inside_RR.reshape(num_ranks, num_ranks))
