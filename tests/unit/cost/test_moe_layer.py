"""Terms by hand, terms that add up, and the directions in which they must move."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import (
    LayerFlow,
    LevelPrice,
    constants_of,
    crossing_bytes_s,
    exchanges_of,
    layer_time,
)
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.cluster import LevelSpec, LinkSpec
from tests.unit.cost.cases import ROUND, cluster, contiguous_flow


def test_every_term_by_hand() -> None:
    # Ranks 0 and 1 on two nodes, expert 0 on rank 0, 1 on rank 1. Rank 0 computes 6 + 4 = 10 tokens, rank 1 2 + 8.
    # Equal tokens, one expert each: rank 0. Sources send 8 and 12. 4 tokens go from 1 to 0, 2 back: ports 4, reverse 2.
    time = layer_time(contiguous_flow([[6, 2], [4, 8]], num_nodes=2), ROUND)
    assert time.fixed_s == 1.0
    assert time.source_s == pytest.approx(0.1 * 12)
    assert time.gemm_s == pytest.approx(0.5 * 10)
    assert time.experts_s == pytest.approx(2.0)
    assert time.all_to_all_intra_s == 0
    assert time.all_to_all_inter_s == pytest.approx(1.0 * 4 + 0.5 * 4 + 0.125 * 2)
    assert time.replicas_s == 0
    assert time.hidden_s == 0
    assert time.total_s == pytest.approx(1 + 1.2 + 5 + 2 + 6.25)


def test_the_slowest_level_counts() -> None:
    # As above, each rank a node of its own; a leaf has one node, a spine both. 4 tokens leave the busiest leaf.
    flow = contiguous_flow([[6, 2], [4, 8]], num_nodes=2)
    wide, narrow = LevelPrice(ranks=1, token_s=1.0), LevelPrice(ranks=1, token_s=3.0)
    assert layer_time(flow, replace(ROUND, levels=(wide,))).all_to_all_inter_s == pytest.approx(6.25)  # hidden by ports
    assert layer_time(flow, replace(ROUND, levels=(wide, narrow))).all_to_all_inter_s == pytest.approx(3.0 * 4)
    inside = LevelPrice(ranks=2, token_s=100.0)
    assert layer_time(flow, replace(ROUND, levels=(inside,))).all_to_all_inter_s == pytest.approx(6.25)


def test_levels_of_a_cluster_file() -> None:
    leaf = LevelSpec(name="leaf", nodes=2, link=LinkSpec(bandwidth_bytes_s=5.0, latency_s=1.0))
    machine = replace(cluster(nodes=4), levels=(leaf,), efficiency={"all_to_all_inter": 0.5})
    expert = ExpertShape(hidden=4, ffn=8)
    assert constants_of(machine, expert).levels == (LevelPrice(ranks=4, token_s=4 * 8 / (5.0 * 0.5)),)
    measured = replace(machine, efficiency={"all_to_all_inter": 0.5, "all_to_all_leaf": 1.0})
    assert constants_of(measured, expert).levels[0].token_s == 4 * 8 / 5.0
    assert [crossing_bytes_s(measured, nodes) for nodes in (1, 2, 4)] == [80.0, 5.0, 5.0]


def test_replicas_cost_their_traffic() -> None:
    # Expert 0 of rank 0 has a replica on rank 1: one replica over the port inside the node, 3 s. It halves expert 0.
    slots_RS = np.array([[0, -1], [1, 0]])
    flow = LayerFlow.equal_split(np.array([[6, 0], [4, 0]]), slots_RS)
    time = layer_time(flow, ROUND)
    assert time.replicas_s == 3.0
    assert time.gemm_s == pytest.approx(0.5 * 5)
    assert flow.traffic_RR.tolist() == [[3, 3], [2, 2]]
    assert layer_time(LayerFlow.equal_split(np.array([[6, 0], [4, 0]]), slots_RS, num_nodes=2), ROUND).replicas_s == 7.0


def test_overlap_hides_at_most_the_compute() -> None:
    flow = contiguous_flow([[6, 2], [4, 8]], num_nodes=2)
    # Four chunks leave a quarter of the 6.25 s in the open; nothing hides behind more than the 7 s of compute.
    assert layer_time(flow, ROUND, all_to_all_chunks=4).hidden_s == pytest.approx(-0.75 * 6.25)
    busy = contiguous_flow([[0, 80], [0, 0]], num_nodes=2)
    time = layer_time(busy, ROUND, all_to_all_chunks=1000)
    assert time.hidden_s == -(time.gemm_s + time.experts_s)


def test_hosts_take_their_shares_from_every_source() -> None:
    share_ER = np.array([[3, 1], [0, 5]])  # expert 0 at home on rank 0, a replica on rank 1
    flow = LayerFlow.from_shares(np.array([[8, 0], [4, 5]]), share_ER, np.array([[0, -1], [1, 0]]))
    assert flow.load_ER.tolist() == [[9, 3], [0, 5]]
    assert flow.traffic_RR.tolist() == [[6, 2], [3, 1 + 5]]
    assert flow.replicas_RR.tolist() == [[0, 1], [0, 0]]


def test_tokens_without_a_host_are_named() -> None:
    with pytest.raises(PlanError, match="expert 1 has 7 tokens and no share on any rank"):
        LayerFlow.from_shares(np.array([[0, 7]]), np.array([[1], [0]]), np.array([[0, 1]]))


def test_explain_prints_every_term_and_their_sum() -> None:
    lines = layer_time(contiguous_flow([[6, 2], [4, 8]], num_nodes=2), ROUND).explain().splitlines()
    terms = [float(line.split(" ms")[0].split()[-1]) for line in lines]
    assert len(terms) == 10
    assert sum(terms[:-1]) == pytest.approx(terms[-1])
    assert terms[-1] == 15450.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 1), (4, 2), (8, 2)]), st.integers(1, 4))
def test_terms_add_up_and_tokens_are_conserved(seed: int, ranks_and_nodes: tuple[int, int], chunks: int) -> None:
    num_ranks, num_nodes = ranks_and_nodes
    counts_RE = np.random.default_rng(seed).integers(0, 50, (num_ranks, 2 * num_ranks))
    flow = contiguous_flow(counts_RE, num_nodes)
    assert flow.load_ER.sum() == pytest.approx(counts_RE.sum())
    assert flow.traffic_RR.sum() == pytest.approx(counts_RE.sum())
    time = layer_time(flow, ROUND, all_to_all_chunks=chunks)
    assert time.total_s == pytest.approx(sum(getattr(time, field.name) for field in fields(time)))
    assert 0 < time.total_s <= layer_time(flow, ROUND).total_s + 1e-9


def test_constants_of_a_datasheet() -> None:
    # 2 x 3 x 5 = 30 weights: 60 bytes a replica, 180 operations and 6 bytes a token. Memory and links: 80% of 1000 B/s.
    constants = constants_of(cluster(), ExpertShape(hidden=3, ffn=5, gated=False))
    row_s = 6 / 800
    assert constants.fixed_s == pytest.approx(200 * 10e-6 + (4 + 2) * 2.0)  # sizes among 2 ranks go 2 messages deep
    assert constants.source_token_s == pytest.approx(8 * row_s)
    assert constants.token_s == pytest.approx(180 / 600 + 8 * row_s)
    assert constants.expert_s == pytest.approx(3 * 60 / 800)
    assert constants.half_rate_tokens == pytest.approx(0.225 / 0.36)
    assert constants.intra_token_s == pytest.approx(4 * 6 / 80)
    assert constants.inter_gpu_token_s == pytest.approx(4 * 6 / 8)
    assert constants.inter_node_token_s == 0
    assert constants.intra_replica_s == pytest.approx((60 + 120) / 80)
    assert constants.inter_replica_s == pytest.approx((60 + 120) / 8)


@pytest.mark.parametrize(
    ("changes", "exchanges"),
    [
        ({}, 4),
        ({"dispatcher": "flex"}, 4),
        ({"chunks": 4}, 4),
        ({"chunks": 8}, 6),  # one source in a chunk
        ({"slots": 1}, 6),
        ({"expert_tensor_ranks": 2}, 6),
        ({"dispatcher": "hierarchical"}, 6),
        ({"dispatcher": "allgather"}, 6),
        ({"padded": True}, 6),
        ({"overlaps_micro_batches": True}, 6),
    ],
)
def test_rows_and_weights_travel_together_where_the_layer_packs_them(changes: dict[str, Any], exchanges: int) -> None:
    assert exchanges_of(**{"ranks": 8, "slots": 4, **changes}) == exchanges


def test_a_shared_card_is_as_fast_as_all_its_shares() -> None:
    constants = constants_of(cluster(), ExpertShape(hidden=3, ffn=5, gated=False), shared_network_card=True)
    assert constants.inter_gpu_token_s == constants.intra_token_s  # the way to the card is the port used inside
    assert constants.inter_node_token_s == pytest.approx(4 * 6 / 16)
