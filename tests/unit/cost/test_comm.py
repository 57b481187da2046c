"""Busiest ports by hand."""

import numpy as np
import pytest

from megatron_smartmoe.cost.comm import busiest_domain, busiest_ports, replica_traffic, transfer_s
from megatron_smartmoe.spec.cluster import LinkSpec


def test_busiest_ports_of_two_nodes() -> None:
    # Ranks 0, 1 on node 0 and 2, 3 on node 1. Inside: rank 0 sends 5, rank 1 receives 5; rank 2 receives 4.
    # Between: rank 3 receives 10 + 20 = 30; node 0 sends 30 and receives 3. What stays on its rank is free.
    traffic_RR = np.array([[99, 5, 0, 10], [0, 0, 0, 20], [3, 0, 0, 0], [0, 0, 4, 0]], dtype=float)
    ports = busiest_ports(traffic_RR, 2)
    assert (ports.intra, ports.inter_gpu, ports.inter_node, ports.inter_node_reverse) == (5, 30, 30, 3)


def test_one_node_has_no_traffic_between_nodes() -> None:
    ports = busiest_ports(np.ones((4, 4)), 1)
    assert (ports.intra, ports.inter_gpu, ports.inter_node, ports.inter_node_reverse) == (3, 0, 0, 0)


def test_replica_traffic_comes_from_the_home() -> None:
    # Homes: experts 2, 3 on rank 0 and 0, 1 on rank 1; rank 0 holds a replica of 1, rank 1 replicas of 2 and 3.
    slots_RS = np.array([[2, 3, 1, -1], [0, 1, 2, 3]])
    assert replica_traffic(slots_RS, 4).tolist() == [[0, 2], [1, 0]]


def test_alpha_beta() -> None:
    link = LinkSpec(bandwidth_bytes_s=100.0, latency_s=2.0)
    assert transfer_s(300, link) == pytest.approx(5.0)
    assert transfer_s(0, link) == 0


def test_the_busiest_domain_of_a_level() -> None:
    # Domains of two ranks: 0 and 1, 2 and 3. 10 + 20 tokens leave the first, 3 enter it: 15 for each of its ranks.
    traffic_RR = np.array([[99, 5, 0, 10], [0, 0, 0, 20], [3, 0, 0, 0], [0, 0, 4, 0]], dtype=float)
    assert busiest_domain(traffic_RR, 2) == 15
    assert busiest_domain(traffic_RR, 4) == 0  # the group is in one domain
    assert busiest_domain(traffic_RR, 8) == 0
