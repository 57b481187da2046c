"""Counts shared out anew, and a step's terms under a setting, by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow
from megatron_smartmoe.cost.step.step import StepTime
from megatron_smartmoe.placement.kernels import NUMPY
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.simulate.whatif import GROUP_OF, GROUPS, Move, RecordedPolicy, rank_time, regrouped
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace


def trace_of(counts: np.ndarray) -> RoutingTrace:
    return RoutingTrace(counts=counts, iteration=np.arange(1, len(counts) + 1), layer=np.arange(counts.shape[1]))


@pytest.fixture
def trace() -> RoutingTrace:
    """Three iterations, two layers, four source ranks, five experts."""
    return trace_of(np.random.default_rng(0).integers(0, 50, (3, 2, 4, 5)))


@pytest.mark.parametrize(("sources", "micro_batches"), [(1, 1), (2, 3), (4, 2), (8, 1), (16, 4)])
def test_no_assignment_is_lost_or_made(trace: RoutingTrace, sources: int, micro_batches: int) -> None:
    shared = regrouped(trace, sources, micro_batches)
    assert shared.counts.shape == (3, 2, sources, micro_batches, 5)
    assert (shared.counts.sum(axis=(2, 3)) == trace.counts.sum(axis=2)).all()


def test_source_ranks_are_merged_and_split_in_their_order(trace: RoutingTrace) -> None:
    assert (regrouped(trace, 2, 1).counts[:, :, 1, 0] == trace.counts[:, :, 2:].sum(axis=2)).all()
    halves = regrouped(trace, 8, 1).counts[:, :, 2:4, 0].astype(int)
    assert (halves.sum(axis=2) == trace.counts[:, :, 1]).all()
    assert (abs(halves[:, :, 0] - halves[:, :, 1]) <= 1).all()


def test_remainders_do_not_all_go_to_the_first_part() -> None:
    shared = regrouped(trace_of(np.ones((1, 1, 1, 8), dtype=np.int64)), 4, 1)
    assert shared.counts[0, 0, :, 0].sum(axis=1).tolist() == [2, 2, 2, 2]


def test_recorded_micro_batches_stay_as_they_are() -> None:
    counts = np.random.default_rng(0).integers(0, 50, (2, 1, 2, 3, 4))
    assert (regrouped(trace_of(counts), 2, 3).counts == counts).all()
    assert (regrouped(trace_of(counts), 2, 1).counts[:, :, :, 0] == counts.sum(axis=3)).all()


def test_homes_move_after_the_step_that_they_moved_after() -> None:
    start = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2, spare_slots=1)
    moved = Placement(slots_LRS=np.array([[[0, 3], [2, 1]]]), num_experts=4)
    options = OnlineOptions(homes_interval=0)
    moves = [Move(iteration=5, homes=moved)]
    policy = RecordedPolicy(start, 1, options, lambda slots_RS, counts_RE: 0.0, moves, NUMPY)
    policy.before(5)
    assert policy.homes(0).tolist() == [0, 0, 1, 1]
    policy.before(6)
    assert policy.homes(0).tolist() == [0, 1, 1, 0]
    assert policy.stats.experts_moved == 2


def test_every_term_of_a_step_is_in_a_group() -> None:
    assert {term.name for term in fields(StepTime)} == set(GROUP_OF)
    assert set(GROUP_OF.values()) == set(GROUPS)


def test_a_rank_pays_for_what_it_computes_sends_and_receives() -> None:
    flow = LayerFlow(
        load_ER=np.array([[30.0, 0.0], [0.0, 8.0], [0.0, 2.0]]),
        traffic_RR=np.array([[16.0, 4.0], [14.0, 6.0]]),
        replicas_RR=np.array([[0.0, 1.0], [0.0, 0.0]]),
    )
    prices: dict[str, Any] = {term.name: 1.0 for term in fields(LayerConstants)}
    unit = LayerConstants(**{**prices, "levels": ()})
    first, second = (rank_time(flow, rank, unit) for rank in (0, 1))
    assert (first.gemm_s, second.gemm_s) == (30.0, 10.0)
    assert (first.experts_s, second.experts_s) == (1.0, 2.0)
    assert (first.source_s, second.source_s) == (20.0, 20.0)
    assert first.all_to_all_intra_s == second.all_to_all_intra_s == 9.0  # 4 out and 14 in, the mean of both
    assert first.replicas_s == second.replicas_s == 1.0
    apart = rank_time(replace(flow, num_nodes=2), 0, unit)
    assert (apart.all_to_all_intra_s, apart.all_to_all_inter_s) == (0.0, 9.0)
