"""The search finds what pricing the whole space finds, and every point that it leaves out has a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.planner.search import SearchResult, search
from megatron_smartmoe.planner.space import (
    RECOMPUTE,
    Rejected,
    SpaceOptions,
    exchanges,
    overlap_degrees,
    shapes,
    spare_slots,
)
from megatron_smartmoe.spec.parallel import DISPATCHES, FLAT, ParallelSpec, violation
from tests.support.models import CLUSTER, SMALL
from tests.unit.planner.cases import pricing

SPACE = SpaceOptions(micro_batches=(1, 2), spare_slots=(0, 1), overlap_degrees=(1, 2), max_virtual=2)


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(pricing(), 8, SPACE, limit=3)


def test_experts_with_biases_are_planned_as_others_are() -> None:
    spec = ParallelSpec(gpus=8, ep=4)
    biased = replace(SMALL, bias=True)
    assert spare_slots(biased, spec, SPACE) == spare_slots(SMALL, spec, SPACE) == (0, 1)
    assert overlap_degrees(biased, spec, SPACE) == (1, 2)
    replicated = replace(spec, spare_slots=1, replicas="auto")
    flags = megatron_flags(biased, replicated).all
    assert "--smartmoe-spare-slots" in flags
    assert "--smartmoe-experts" not in flags


def whole_space(prices: Pricing, options: SpaceOptions) -> list[float]:
    """Seconds of every shape's best launch, priced without any bound, fastest first; and every bound is one."""
    seconds = []
    for shape in shapes(prices.model, prices.cluster, 8, options):
        if isinstance(shape, Rejected):
            continue
        least_bytes, first_mode = prices.least_memory(shape, options.recompute)
        best = float("inf")
        for slots in spare_slots(prices.model, shape, options):
            slotted = replace(shape, spare_slots=slots, replicas="auto" if slots else "off")
            for degree, dispatch in exchanges(prices.model, prices.cluster, slotted, options):
                for mode in options.recompute:
                    spec = replace(slotted, overlap_degree=degree, dispatch=dispatch, recompute=mode)
                    if not spec.recomputes(mode):
                        continue
                    plan = prices.price(spec)
                    assert first_mode is not None or plan.memory.total >= least_bytes
                    assert plan.expected_s >= prices.least_s(shape, options, mode) * (1 - 1e-12)
                    if plan.memory.total <= prices.cluster.gpu.memory_bytes:
                        assert first_mode is not None
                        assert RECOMPUTE.index(mode) >= RECOMPUTE.index(first_mode)
                        best = min(best, plan.expected_s)
        seconds.append(best)
    return sorted(seconds)


# Few large experts on slow links and little memory: replicas keep tokens local, much is recomputed and hidden.
HEAVY = replace(SMALL, layers=4, mtp_layers=1, moe=replace(SMALL.moe, experts=4, ffn=8192, first_dense=1))
SLOW = replace(CLUSTER, intra_node=replace(CLUSTER.intra_node, bandwidth_bytes_s=3e9))
CORES = replace(CLUSTER, gpu=replace(CLUSTER.gpu, ranks_per_device=2.0, memory_bytes=12e9))


@pytest.mark.parametrize(
    ("prices", "options"),
    [
        (pricing(), SPACE),
        (pricing(1.9, HEAVY, SLOW), replace(SPACE, spare_slots=(0, 2), overlap_degrees=(1, 8), micro_batches=(1,))),
        (pricing(6.0, cluster=CORES), replace(SPACE, overlap_degrees=(4,), homes_interval=0, micro_batches=(2,))),
    ],
    ids=["small", "slow links", "shared cores"],
)
def test_the_best_are_those_of_the_whole_space(prices: Pricing, options: SpaceOptions) -> None:
    found = [plan.expected_s for plan in search(prices, 8, options, limit=3).best]
    assert found == pytest.approx(whole_space(prices, options)[:3], rel=1e-12)


def test_every_point_is_accounted_for(result: SearchResult) -> None:
    assert len(result.best) + len(result.rejected) == result.shapes
    assert all(rejected.reason for rejected in result.rejected)


def test_terms_add_up_and_scenarios_average(result: SearchResult) -> None:
    weights = (0.8, 0.2)
    for plan in result.best:
        assert sum(seconds for _, seconds in plan.time.terms()) == pytest.approx(plan.expected_s)
        mean = sum(w * s for w, s in zip(weights, plan.scenario_s, strict=True))
        assert mean == pytest.approx(plan.expected_s)
        assert sum(size for _, size in plan.memory.parts()) == pytest.approx(plan.memory.total)


def test_no_plan_breaks_a_rule_or_the_memory(result: SearchResult) -> None:
    for plan in [*result.best, *result.pareto]:
        assert violation(SMALL, plan.spec) is None
        assert plan.memory.total <= CLUSTER.gpu.memory_bytes


def test_pareto_trades_time_for_memory(result: SearchResult) -> None:
    sizes = [plan.memory.total for plan in result.pareto]
    assert sizes == sorted(sizes, reverse=True)
    assert result.pareto[0].expected_s == result.best[0].expected_s


def test_replicas_pay_under_skew_only() -> None:
    assert (
        search(pricing(5.0), 8, SPACE).best[0].expected_s
        < search(pricing(5.0), 8, replace(SPACE, spare_slots=(0,))).best[0].expected_s
    )
    assert search(pricing(1.0), 8, SPACE).best[0].spec.spare_slots == 0


@pytest.mark.parametrize(("inter_bytes_s", "dispatch"), [(2e9, "hierarchical"), (300e9, "flat")])
def test_tokens_cross_nodes_once_where_that_pays(inter_bytes_s: float, dispatch: str) -> None:
    """Experts of one rank each, so that every group lies on both nodes, and no overlap."""
    model = replace(SMALL, moe=replace(SMALL.moe, top_k=6))
    links = replace(CLUSTER, inter_node=replace(CLUSTER.inter_node, bandwidth_bytes_s=inter_bytes_s))
    space = replace(SPACE, fixed={"ep": 8, "etp": 1, "pp": 1}, overlap_degrees=(1,))
    prices = Pricing(model, links, pricing().loads)
    best = search(prices, 8, space).best[0]
    assert best.spec.dispatch == dispatch
    (other,) = {*DISPATCHES} - {best.spec.dispatch}
    assert prices.price(replace(best.spec, dispatch=other)).expected_s > best.expected_s
    shape = replace(best.spec, spare_slots=0, replicas="off", dispatch=FLAT)
    assert prices.least_s(shape, space, shape.recompute) <= best.expected_s


def test_nothing_fits_says_how_far() -> None:
    tiny = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=4e9))
    with pytest.raises(ConfigError, match=r"no launch fits: the smallest needs .* GB per GPU, and a GPU has 4.0 GB"):
        search(pricing(cluster=tiny), 8, SPACE)
