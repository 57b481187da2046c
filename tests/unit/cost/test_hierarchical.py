"""What a hierarchical all-to-all carries, by hand and against the closed formula for distinct nodes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_smartmoe.cost.comm import BusiestPorts, busiest_ports
from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, Dispatcher, RowShares, rows_of_a_choice
from megatron_smartmoe.cost.hierarchical import (
    HopCounts,
    mean_ports,
    more_rows_by_node,
    rows_by_node,
    rows_copied,
    to_gateways,
)
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, LevelPrice, layer_time
from megatron_smartmoe.placement.plan_homes import node_swap_price
from megatron_smartmoe.spec.parallel import HIERARCHICAL
from tests.support.distinct_nodes import distinct_groups, tokens_by_group

pytestmark = pytest.mark.fast

# Four ranks on two nodes; rank r sends 4 rows to each rank, and 5 tokens have an expert on each node.
EVEN_RR = np.full((4, 4), 4.0)
ONCE_RN = np.full((4, 2), 5.0)


@pytest.mark.parametrize(("num_experts", "top_k", "num_nodes"), [(256, 8, 2), (256, 8, 4), (128, 8, 8), (8, 2, 4)])
def test_even_traffic_follows_the_closed_formula(num_experts: int, top_k: int, num_nodes: int) -> None:
    tokens = 1000.0
    choices_RN = np.full((8, num_nodes), tokens * top_k / num_nodes)
    found = rows_by_node(choices_RN, num_experts, top_k)
    np.testing.assert_allclose(found.sum(axis=1), tokens * distinct_groups(num_experts, top_k, num_nodes))


def test_skewed_traffic_is_near_the_formula_that_weighs_every_expert() -> None:
    counts_RE = np.random.default_rng(3).lognormal(sigma=1.0, size=(8, 64)) * 100
    found = rows_by_node(counts_RE.reshape(8, 4, 16).sum(axis=2), 64, 6)
    exact = tokens_by_group(counts_RE, np.arange(64) // 16, 4, 6)
    assert np.abs(found / exact - 1).mean() < 0.04  # 0.03; a tenth for single pairs of a rank and a node


def test_one_expert_a_token_crosses_once_either_way() -> None:
    np.testing.assert_allclose(rows_by_node(np.full((4, 2), 8.0), 8, 1), 8.0)


def test_rows_of_both_hops() -> None:
    # Rank 0 sends 5 rows to its gateway, rank 2, and none to rank 3.
    assert to_gateways(ONCE_RN)[0].tolist() == [5.0, 0.0, 5.0, 0.0]
    assert to_gateways(ONCE_RN)[3].tolist() == [0.0, 5.0, 0.0, 5.0]
    # As a gateway it passes on 4 rows of its own and 4 of rank 2 to rank 1, and keeps as many; 16 rows arrive.
    hops = HopCounts.of(EVEN_RR, 2)
    assert hops.choices_RN.tolist() == [[8.0, 8.0]] * 4
    assert (hops.inside, hops.handled_R.tolist()) == (8.0, [32.0] * 4)
    assert hops.scaled(0.5).inside == 4.0
    flat = busiest_ports(EVEN_RR, 2)
    assert (flat.intra, flat.inter_gpu, flat.inter_node) == (4.0, 8.0, 16.0)
    # The mean of a flat exchange and of a hierarchical one, which carries 8 inside, and 5 and 10 between.
    assert mean_ports(flat, hops, ONCE_RN) == BusiestPorts(
        intra=6.0, inter_gpu=6.5, inter_node=13.0, inter_node_reverse=13.0
    )
    # A rank collects 10 rows, passes on 16, and orders 16: twice.
    assert rows_copied(hops, ONCE_RN) == 84.0


def test_the_layers_time_has_half_of_its_exchanges_in_two_hops() -> None:
    # 4 tokens of a rank have all 4 experts each: 4 rows to either node, instead of 8.
    two_hops = Dispatcher(name=HIERARCHICAL, experts=4, top_k=4)
    flow = LayerFlow(load_ER=np.zeros((4, 4)), traffic_RR=EVEN_RR, replicas_RR=np.zeros((4, 4)), num_nodes=2)
    constants = LayerConstants(inter_gpu_token_s=1.0, intra_token_s=0.1, source_token_s=0.01)
    time = layer_time(flow, constants, dispatcher=two_hops)
    assert time.all_to_all_inter_s == pytest.approx((8 + 4) / 2)
    assert time.all_to_all_intra_s == pytest.approx(0.1 * (4 + 8) / 2)
    assert time.source_s == pytest.approx(0.01 * (16 + 2 * (8 + 32) / 4))  # 2 of 8 passes over a row
    # A level above the nodes: of a node of 2 ranks, 8 rows of each go out flat and 4 in two hops.
    leveled = replace(constants, levels=(LevelPrice(ranks=2, token_s=2.0),))
    assert layer_time(flow, leveled, dispatcher=two_hops).all_to_all_inter_s == pytest.approx(2.0 * 6)
    assert layer_time(replace(flow, num_nodes=1), constants, dispatcher=two_hops).all_to_all_inter_s == 0.0


@pytest.mark.parametrize(("num_experts", "top_k", "num_nodes"), [(256, 8, 2), (64, 6, 8), (8, 1, 4), (4, 4, 2)])
def test_rows_of_one_more_choice(num_experts: int, top_k: int, num_nodes: int) -> None:
    """The derivative of the rows, by a small difference."""
    share, step = 1 / num_nodes, 1e-6
    choices = np.array([[share, 1 - share], [share + step, 1 - share - step]])
    rows = rows_by_node(choices, num_experts, top_k)[:, 0]
    assert more_rows_by_node(share, num_experts, top_k) == pytest.approx((rows[1] - rows[0]) / step, abs=1e-4)


def test_homes_of_another_node_are_worth_less_in_two_hops() -> None:
    flat, two_hops = ALL_TO_ALL, Dispatcher(name=HIERARCHICAL, experts=256, top_k=8)
    assert rows_of_a_choice(flat, 2) == RowShares(between=0.5, inside=0.5)
    # Of 8 choices of a token nearly always one is on the node anyway: one more is a row in 1 of 139 cases.
    found = rows_of_a_choice(two_hops, 2)
    assert (found.between, found.inside) == (pytest.approx((0.5 + 0.5 / 139) / 2, rel=1e-4), 0.75)
    assert rows_of_a_choice(replace(two_hops, top_k=1), 2) == RowShares(between=0.5, inside=0.75)
    constants = LayerConstants(inter_gpu_token_s=1.0)
    price = partial(node_swap_price, constants, 100.0, num_nodes=2, swap_s=1.0, worth_s=1.0)
    assert price(dispatcher=two_hops) == pytest.approx(price(dispatcher=flat) * 0.5 / found.between)


@pytest.mark.parametrize(("nodes", "published"), [(2, 3.27), (4, 2.01)])
def test_distinct_ranks_over_distinct_nodes_as_measured(nodes: int, published: float) -> None:
    """E 256, K 8, 8 ranks a node, an even load: DeepEP's published runs."""
    distinct = [rows_by_node(np.full((1, groups), 8.0 / groups), 256, 8).sum() for groups in (8 * nodes, nodes)]
    assert distinct[0] / distinct[1] == pytest.approx(published, abs=0.005)
