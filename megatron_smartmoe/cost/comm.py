"""Communication: what the busiest link of an all-to-all, or of replica traffic, has to carry.

Method. An exchange ends when its busiest port has sent or received everything, so a few numbers of a traffic
matrix matter: the busiest GPU inside a node, the busiest GPU's traffic with other nodes, and the busiest node's traffic
with other nodes (machines whose GPUs share one network card). A full duplex port's time is the larger of what it sends
and what it receives; a shared card that stages through host memory also pays for the other direction, which is counted
apart. Time is alpha-beta (Hockney 1994): latency plus bytes over bandwidth.

The alternative, mean bytes per rank, is what FasterMoE's shadowing and most planners use; with a hot expert the rank
that hosts it receives several times the mean, and the others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.cluster import LinkSpec
from megatron_smartmoe.spec.placement import EMPTY


@dataclass(frozen=True, kw_only=True)
class BusiestPorts:
    """The most that one port sends or receives, in the unit of the traffic matrix (tokens or replicas).

    Attributes:
        intra: one GPU, with GPUs of its own node.
        inter_gpu: one GPU, with GPUs of other nodes.
        inter_node: one node, with other nodes.
        inter_node_reverse: the same node's less busy direction.
    """

    intra: float
    inter_gpu: float
    inter_node: float
    inter_node_reverse: float


NOTHING = BusiestPorts(intra=0.0, inter_gpu=0.0, inter_node=0.0, inter_node_reverse=0.0)


def busiest_ports(traffic_RR: FloatArray, num_nodes: int) -> BusiestPorts:
    """Busiest ports of one exchange; `traffic_RR[source, target]`, what stays on its rank is free."""
    # Step 1: split the traffic into what stays on a node and what leaves it.
    num_ranks = traffic_RR.shape[0]
    if num_nodes == 1:
        all_RR = np.array(traffic_RR)
        np.fill_diagonal(all_RR, 0.0)
        return BusiestPorts(intra=_busiest(all_RR), inter_gpu=0.0, inter_node=0.0, inter_node_reverse=0.0)
    node_R = np.arange(num_ranks) * num_nodes // num_ranks
    same_RR = node_R[:, None] == node_R[None, :]
    inter_RR, intra_RR = np.where(same_RR, 0.0, traffic_RR), np.where(same_RR, traffic_RR, 0.0)
    np.fill_diagonal(intra_RR, 0.0)
    # Step 2: add up what leaves each node, and find the node with the busier direction.
    pair_RR = node_R[:, None] * num_nodes + node_R[None, :]
    inter_NN = np.bincount(pair_RR.ravel(), inter_RR.ravel(), num_nodes**2).reshape(num_nodes, num_nodes)
    out_N, in_N = inter_NN.sum(axis=1), inter_NN.sum(axis=0)
    busiest_node = int(np.argmax(np.maximum(out_N, in_N)))
    return BusiestPorts(
        intra=_busiest(intra_RR),
        inter_gpu=_busiest(inter_RR),
        inter_node=float(max(out_N[busiest_node], in_N[busiest_node])),
        inter_node_reverse=float(min(out_N[busiest_node], in_N[busiest_node])),
    )


def busiest_domain(traffic_RR: FloatArray, ranks_per_domain: int) -> float:
    """The most that one domain of consecutive ranks sends out or receives, over its ranks: one rank's share of the
    way out, as a cluster file states the bandwidth of a level above the nodes."""
    domain_R = np.arange(traffic_RR.shape[0]) // ranks_per_domain
    leaves_RR = np.where(domain_R[:, None] == domain_R[None, :], 0.0, traffic_RR)
    out_D, in_D = np.bincount(domain_R, leaves_RR.sum(axis=1)), np.bincount(domain_R, leaves_RR.sum(axis=0))
    return float(max(out_D.max(), in_D.max())) / ranks_per_domain


def replica_traffic(slots_RS: IntArray, num_experts: int) -> FloatArray:
    """Replicas that rank r fills with weights on rank q before the forward pass, `[R, R]`; gradients go back."""
    num_ranks = slots_RS.shape[0]
    home_slots = num_experts // num_ranks
    home_rank_E = np.argsort(slots_RS[:, :home_slots].ravel(), kind="stable") // home_slots
    rank, slot = np.nonzero(slots_RS[:, home_slots:] != EMPTY)
    replicas_RR = np.zeros((num_ranks, num_ranks))
    np.add.at(replicas_RR, (home_rank_E[slots_RS[rank, slot + home_slots]], rank), 1.0)
    return replicas_RR


def transfer_s(num_bytes: float, link: LinkSpec) -> float:
    """Time of one message of `num_bytes` over `link`; nothing to send takes no time."""
    return link.latency_s + num_bytes / link.bandwidth_bytes_s if num_bytes > 0 else 0.0


def _busiest(traffic_PP: FloatArray) -> float:
    """The larger of what one port sends (rows) and receives (columns)."""
    return float(max(traffic_PP.sum(axis=1).max(), traffic_PP.sum(axis=0).max()))
