"""What a hierarchical all-to-all carries between nodes and inside them, and what its two hops cost besides.

Method. Of the four exchanges of a layer two are hierarchical: the dispatch, and the gradient of the combine, whose rows
are copies. The other two bring back rows that differ, and stay flat: adding them up on the way would change the order
of the sum (see `runtime.hierarchical_exchange`). A hierarchical exchange carries between nodes one row for each token
and node, and inside nodes everything else: a gateway passes on what all nodes have sent it, copies included. The hops
follow each other, so their times add up.

How many rows that are is estimated from the counts. A node with a share q of a source's choices counts as q E of E
equally likely experts, of which a token draws K different ones: it is missed with the chance

    (1 - q)E (1 - q)E - 1 ... (1 - q)E - K + 1 / (E (E - 1) ... (E - K + 1))

which for q = 1/N is exact: N (1 - C(E - E/N, K) / C(E, K)) distinct nodes (hypergeometric). Weighing every expert by
itself (conditional Poisson sampling, Hajek 1964) takes a thousand times as long, and a planner prices thousands of
launches; the tests compare with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_ports
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.cluster import LinkSpec

HIERARCHICAL_EXCHANGES = 2  # of a layer's four: the dispatch, and the gradient of the combine
# Collectives more than a flat layer has: the second hop of both, and the exchange of which rows are copies of which.
MORE_EXCHANGES = 3
# Small kernels more than a flat layer has: finding the rows that are sent, and the order of what arrives. Counted in
# the code of `runtime.hierarchical_exchange`, not measured.
MORE_LAUNCHES = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class HopCounts:
    """What of a flow decides the time of its exchanges in two hops.

    Attributes:
        choices_RN: choices of source rank r whose expert is on node n.
        inside: rows of the busiest rank in the second hop, those that stay on their rank left out.
        handled_R: rows that rank r passes on as a gateway, and those that arrive at it.
    """

    choices_RN: FloatArray
    inside: float
    handled_R: FloatArray

    @classmethod
    def of(cls, traffic_RR: FloatArray, num_nodes: int) -> HopCounts:
        """Count a flow.

        Args:
            traffic_RR: choices of source rank r whose expert is on rank q; ranks of a node are consecutive.
            num_nodes: N, which divides R.
        """
        num_ranks = len(traffic_RR)
        # [n, l, m, j]: from rank l of node n to rank j of node m; rank l of node m passes it on
        flat_NLNL = traffic_RR.reshape(num_nodes, -1, num_nodes, num_ranks // num_nodes)
        passed_NLL = flat_NLNL.sum(axis=0).transpose(1, 0, 2)
        others_NLL = passed_NLL * (1 - np.eye(passed_NLL.shape[1]))
        return cls(
            choices_RN=flat_NLNL.sum(axis=3).reshape(num_ranks, num_nodes),
            inside=float(max(others_NLL.sum(axis=1).max(), others_NLL.sum(axis=2).max())),
            handled_R=passed_NLL.sum(axis=2).ravel() + traffic_RR.sum(axis=0),
        )

    def scaled(self, factor: float) -> HopCounts:
        """The same flow with `factor` times the tokens."""
        return HopCounts(
            choices_RN=self.choices_RN * factor, inside=self.inside * factor, handled_R=self.handled_R * factor
        )


def rows_by_node(choices_RN: FloatArray, num_experts: int, top_k: int) -> FloatArray:
    """Tokens of source rank r with at least one expert on node n, `[R, N]`, estimated from the counts.

    Args:
        choices_RN: choices of source rank r whose expert is on node n.
        num_experts: E.
        top_k: K, choices of a token.
    """
    choices_R1 = choices_RN.sum(axis=1, keepdims=True)
    outside_RN = num_experts * (1 - choices_RN / np.maximum(choices_R1, 1e-300))
    missed_RN = np.ones_like(outside_RN)
    for drawn in range(top_k):
        missed_RN *= np.maximum(outside_RN - drawn, 0.0) / (num_experts - drawn)
    return np.asarray(np.minimum(choices_R1 / top_k * (1 - missed_RN), choices_RN))


def more_rows_by_node(share: float, num_experts: int, top_k: int) -> float:
    """Rows to a node that one more choice there adds: the derivative of `rows_by_node` by the choices.

    Args:
        share: of the choices that are for the node.
        num_experts: E.
        top_k: K, choices of a token.
    """
    # With q of the choices a token misses the node with the chance m(q), a product; d(1 - m) / (K dq).
    outside = [num_experts * (1 - share) - drawn for drawn in range(top_k)]
    if outside[-1] <= 0:
        return 0.0  # every token has an expert there
    missed = math.prod(left / (num_experts - drawn) for drawn, left in enumerate(outside))
    return missed * sum(num_experts / left for left in outside) / top_k


def to_gateways(once_RN: FloatArray) -> FloatArray:
    """Rows from rank to rank in the first hop, `[R, R]`.

    Args:
        once_RN: rows to each node, once for each token.
    """
    num_ranks, num_nodes = once_RN.shape
    place_L = np.arange(num_ranks // num_nodes)
    hop_NLNL = np.zeros((num_nodes, len(place_L), num_nodes, len(place_L)))
    hop_NLNL[:, place_L, :, place_L] = once_RN.reshape(num_nodes, -1, num_nodes).transpose(1, 0, 2)
    return hop_NLNL.reshape(num_ranks, num_ranks)


def mean_ports(flat: BusiestPorts, hops: HopCounts, once_RN: FloatArray) -> BusiestPorts:
    """The busiest ports of a layer's mean exchange: of four, two are hierarchical.

    Args:
        flat: the ports of a flat exchange.
        hops: of the same flow.
        once_RN: rows to each node, once for each token.
    """
    first = busiest_ports(to_gateways(once_RN), once_RN.shape[1])
    return BusiestPorts(
        intra=(flat.intra + hops.inside) / 2,
        inter_gpu=(flat.inter_gpu + first.inter_gpu) / 2,
        inter_node=(flat.inter_node + first.inter_node) / 2,
        inter_node_reverse=(flat.inter_node_reverse + first.inter_node_reverse) / 2,
    )


def rows_copied(hops: HopCounts, once_RN: FloatArray) -> float:
    """Rows that the busiest rank copies in memory besides, in the two hierarchical exchanges of a layer.

    It collects what it sends once, copies it as a gateway, and puts what arrives into the flat order.
    """
    return HIERARCHICAL_EXCHANGES * float((once_RN.sum(axis=1) + hops.handled_R).max())


def hops_fixed_s(link: LinkSpec, ranks: int, launch_s: float) -> float:
    """Seconds of a layer that the two hops take without a token.

    Args:
        link: the slowest link of the group.
        ranks: of the group.
        launch_s: from one small kernel to the next.
    """
    return MORE_EXCHANGES * link.all_to_all_latency_of(ranks) + MORE_LAUNCHES * launch_s
