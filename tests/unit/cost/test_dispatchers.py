"""Rows that Megatron's dispatchers send, against closed formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_smartmoe.cost.dispatchers import Dispatcher, DispatcherName, RowShares, rows_at_a_rank, rows_of_a_choice
from megatron_smartmoe.cost.moe_layer import (
    LayerConstants,
    LayerCounts,
    LayerFlow,
    layer_time,
    on_the_wire,
    transfer_price,
)
from megatron_smartmoe.cost.replicas import EVERY_MICRO_BATCH
from megatron_smartmoe.placement.layer_cost import LayerPricing, even_load_s, price_layer
from megatron_smartmoe.placement.layer_plan import LayerPlan
from tests.support.distinct_nodes import distinct_groups

pytestmark = pytest.mark.fast

EXPERTS, RANKS, NODES, TOP_K, TOKENS = 64, 8, 2, 4, 1000.0
PER_NODE = RANKS // NODES


def even_flow(num_nodes: int = NODES) -> LayerFlow:
    counts_RE = np.full((RANKS, EXPERTS), TOKENS * TOP_K / EXPERTS)
    return LayerFlow.equal_split(counts_RE, np.arange(EXPERTS).reshape(RANKS, -1), num_nodes)


def test_all_to_all_sends_a_row_for_each_choice() -> None:
    flow = even_flow()
    assert on_the_wire(flow, Dispatcher()) is flow
    ports = LayerCounts.of(flow).tokens
    assert ports.inter_gpu == pytest.approx(TOKENS * TOP_K / NODES)


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
def test_allgather_sends_every_row_to_every_rank(num_nodes: int) -> None:
    """A rank gets T of each other rank in all, and of other nodes' rows a card brings its share."""
    sent = on_the_wire(even_flow(num_nodes), Dispatcher(name="allgather", top_k=TOP_K))
    assert sent.wire_RR is not None
    np.testing.assert_allclose(sent.wire_RR.sum(axis=0), (RANKS - 1) * TOKENS)
    ports, per_node = LayerCounts.of(sent).tokens, RANKS // num_nodes
    assert ports.inter_gpu == pytest.approx((RANKS - per_node) * TOKENS / per_node)
    assert ports.inter_node == pytest.approx((RANKS - per_node) * TOKENS)
    assert ports.intra == pytest.approx((per_node - 1) * RANKS * TOKENS / per_node)


def test_allgather_does_not_depend_on_the_choices() -> None:
    counts_RE = np.zeros((RANKS, EXPERTS))
    counts_RE[:, 0] = TOKENS * TOP_K
    hot = LayerFlow.equal_split(counts_RE, np.arange(EXPERTS).reshape(RANKS, -1), NODES)
    sent = [on_the_wire(flow, Dispatcher(name="allgather", top_k=TOP_K)) for flow in (hot, even_flow())]
    assert sent[0].wire_RR is not None
    assert sent[1].wire_RR is not None
    np.testing.assert_allclose(sent[0].wire_RR, sent[1].wire_RR)
    assert LayerCounts.of(sent[0]).tokens_R.max() == RANKS * TOKENS * TOP_K  # what it computes does


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_flex_sends_a_row_once_for_each_node_and_rank(num_nodes: int) -> None:
    """N (1 - C(E - E/N, K) / C(E, K)) nodes of a token, and as many ranks; what is there already does not travel."""
    sent = on_the_wire(even_flow(num_nodes), Dispatcher(name="flex", experts=EXPERTS, top_k=TOP_K))
    ports = LayerCounts.of(sent).tokens
    nodes, ranks = (distinct_groups(EXPERTS, TOP_K, groups) for groups in (num_nodes, RANKS))
    assert ports.inter_gpu == pytest.approx(TOKENS * nodes * (num_nodes - 1) / num_nodes)
    per_node = RANKS // num_nodes
    assert ports.intra == pytest.approx(TOKENS * ranks * (per_node - 1) / per_node)


def test_flex_with_one_expert_a_token_sends_what_all_to_all_sends_between_nodes() -> None:
    flow = replace(even_flow(), traffic_RR=even_flow().traffic_RR / TOP_K)
    sent = on_the_wire(flow, Dispatcher(name="flex", experts=EXPERTS, top_k=1))
    assert LayerCounts.of(sent).tokens.inter_gpu == pytest.approx(LayerCounts.of(flow).tokens.inter_gpu)


def test_padding_moves_and_computes_the_capacity_of_every_slot() -> None:
    factor, slots = 1.5, EXPERTS // RANKS
    counts_RE = np.zeros((RANKS, EXPERTS))
    counts_RE[:, 0] = TOKENS * TOP_K
    hot = LayerFlow.equal_split(counts_RE, np.arange(EXPERTS).reshape(RANKS, -1), NODES)
    capacity = np.ceil(TOKENS * TOP_K / EXPERTS * factor)
    padded = Dispatcher(padded_factor=factor, spare_slots=2)
    counts = LayerCounts.of(on_the_wire(hot, padded))
    assert counts.tokens_R.tolist() == [slots * capacity * RANKS] * RANKS
    assert counts.active_R.tolist() == [slots] * RANKS
    assert counts.tokens.inter_gpu == slots * capacity * (RANKS - PER_NODE)
    with_replicas = LayerCounts.of(on_the_wire(replace(hot, replicas_RR=np.eye(RANKS)[::-1]), padded))
    assert with_replicas.tokens_R.tolist() == [(slots + 2) * capacity * RANKS] * RANKS


def test_the_planners_price_has_the_dispatcher() -> None:
    constants = LayerConstants(inter_gpu_token_s=1.0, intra_token_s=0.1)
    homes_RS, counts_RE = np.arange(EXPERTS).reshape(RANKS, -1), np.full((RANKS, EXPERTS), 125)
    plan = LayerPlan(slots_RS=homes_RS, split="exact")
    names: tuple[DispatcherName, ...] = ("alltoall", "allgather", "flex")
    for name in names:
        dispatcher = Dispatcher(name=name, experts=EXPERTS, top_k=TOP_K)
        pricing = LayerPricing(num_ranks=RANKS, num_nodes=NODES, constants=constants, dispatcher=dispatcher)
        found, _ = price_layer(plan, counts_RE, np.arange(EXPERTS) // 8, pricing)
        flow = LayerFlow.equal_split(counts_RE, homes_RS, NODES)
        ports = LayerCounts.of(on_the_wire(flow, dispatcher)).tokens
        assert found == pytest.approx(ports.inter_gpu + 0.1 * ports.intra)
        assert even_load_s(float(counts_RE.sum()), EXPERTS, pricing) == pytest.approx(found)
    assert layer_time(flow, constants).total_s != pytest.approx(found)


def test_what_does_not_depend_on_choices_is_no_reason_to_move_a_home() -> None:
    nothing = RowShares(between=0.0, inside=0.0)
    assert rows_of_a_choice(Dispatcher(name="allgather", top_k=TOP_K), NODES) == nothing
    assert rows_of_a_choice(Dispatcher(padded_factor=1.0), NODES) == nothing
    two_hops, flex = (
        rows_of_a_choice(Dispatcher(name=name, experts=EXPERTS, top_k=TOP_K), NODES)
        for name in ("hierarchical", "flex")
    )
    assert two_hops.between == pytest.approx((0.5 + flex.between) / 2)


def test_a_rank_gets_everything_from_inside_in_two_hops() -> None:
    """What replicas take off the busiest rank; rows from other nodes come through gateways in two of four exchanges."""
    direct, two_hops = (rows_at_a_rank(Dispatcher(name=name), 4) for name in ("alltoall", "hierarchical"))
    assert direct == RowShares(between=0.75, inside=0.25)
    assert two_hops == RowShares(between=0.375, inside=(0.25 + 1) / 2)
    assert rows_at_a_rank(Dispatcher(name="flex"), 4) == RowShares(between=0.0, inside=1.0)
    constants = LayerConstants(token_s=1.0, intra_token_s=0.5, inter_gpu_token_s=4.0, inter_replica_s=8.0)
    price = partial(transfer_price, constants, EVERY_MICRO_BATCH, 100.0, num_nodes=4)
    # a token of the busiest rank takes 1 + 0.5 x 0.25 + 4 x 0.75 seconds, and in two hops 1 + 0.5 x 0.625 + 4 x 0.375
    costs = [price(dispatcher=Dispatcher(name=name)).each_tokens for name in ("alltoall", "hierarchical")]
    assert costs == pytest.approx([8 / 4.125, 8 / 2.8125])
