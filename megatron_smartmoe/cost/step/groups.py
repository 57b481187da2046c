"""Collectives of a process group: where its ranks lie, and how long a ring takes among them.

Method. Ranks are numbered `tp-cp-ep-dp-pp`, so a group is `size` ranks with a fixed stride; `members_per_node` of them
share a node. A ring that crosses nodes goes through every member's own card, so a node's part of the group brings
`members_per_node` cards (hierarchical rings of NCCL reach the same). An all-gather or a reduce-scatter of n bytes over
p ranks takes n (p - 1) / p over the bandwidth (Thakur, Rabenseifner, Gropp 2005) and 1 + log2(p) latencies, as trees
and pipelined rings do, or p - 1 where the cluster file has a ring's; an all-reduce is both.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smartmoe.cost.step.constants import StepConstants
from megatron_smartmoe.spec.cluster import ClusterSpec


@dataclass(frozen=True)
class Group:
    """The ranks of one process group: `size` of them, `stride` apart."""

    size: int
    stride: int

    def members_per_node(self, cluster: ClusterSpec) -> int:
        """How many of them share a node."""
        return min(self.size, max(1, cluster.gpus_per_node // self.stride))

    def crosses_nodes(self, cluster: ClusterSpec) -> bool:
        """Whether any two of them lie on different nodes."""
        return self.size > self.members_per_node(cluster)


def ring_s(num_bytes: float, group: Group, cluster: ClusterSpec, constants: StepConstants) -> float:
    """Seconds of one all-gather or reduce-scatter whose whole result (or input) is `num_bytes`."""
    return _collective_s(num_bytes, group, cluster, (constants.ring_intra, constants.ring_inter))


def all_reduce_s(num_bytes: float, group: Group, cluster: ClusterSpec, constants: StepConstants) -> float:
    """Seconds of one all-reduce of `num_bytes`: a reduce-scatter and an all-gather."""
    return 2 * _collective_s(num_bytes, group, cluster, constants.all_reduce_shares)


def _collective_s(num_bytes: float, group: Group, cluster: ClusterSpec, shares: tuple[float, float]) -> float:
    """Seconds of one ring pass of `num_bytes`, at these shares of the bandwidth inside a node and between nodes."""
    if group.size < 2 or num_bytes <= 0:
        return 0.0
    intra, inter = shares
    bandwidth, link = cluster.intra_node.bandwidth_bytes_s * intra, cluster.intra_node
    if group.crosses_nodes(cluster):
        members = group.members_per_node(cluster)
        cards = members * cluster.inter_node.bandwidth_bytes_s * inter
        bandwidth, link = (min(bandwidth, cards) if members > 1 else cards), cluster.inter_node
    return link.ring_latency_of(group.size) + num_bytes * (group.size - 1) / group.size / bandwidth


def send_s(num_bytes: float, stride: int, cluster: ClusterSpec, constants: StepConstants) -> float:
    """Seconds of one message between ranks `stride` apart."""
    between = stride >= cluster.gpus_per_node
    link = cluster.inter_node if between else cluster.intra_node
    share = constants.ring_inter if between else constants.ring_intra
    return link.latency_s + num_bytes / (link.bandwidth_bytes_s * share)
