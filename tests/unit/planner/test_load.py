"""Loads: what scenarios say, and what balancing makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.cost.hierarchical import HopCounts
from megatron_smartmoe.cost.moe_layer import LayerCounts, LayerFlow
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.load import (
    SOURCE_TOKENS,
    Balance,
    LoadModel,
    scenarios_from_model,
    scenarios_from_skew,
    scenarios_from_trace,
    scenarios_of,
    zipf,
)
from megatron_smartmoe.spec.cluster import LevelSpec, LinkSpec
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.models import CLUSTER, SMALL
from tests.support.synthetic import SyntheticSpec, synthetic_trace

POD = LevelSpec(name="pod", nodes=2, link=LinkSpec(bandwidth_bytes_s=10e9, latency_s=2e-5))


def test_skew_is_the_hottest_experts_load_over_the_mean() -> None:
    expected, worst = scenarios_from_skew(SMALL, 3.0, "x")
    np.testing.assert_allclose(expected.share_PE.max(axis=1) * 16, 3.0, rtol=1e-6)
    np.testing.assert_allclose(worst.share_PE.max(axis=1) * 16, 5.0, rtol=1e-6)
    np.testing.assert_allclose(expected.share_PE.sum(axis=1), 1.0)


def test_zipf_of_an_even_share_is_even() -> None:
    np.testing.assert_allclose(zipf(16, 1 / 16), 1 / 16)


@pytest.mark.parametrize("skew", ["0.5", "8.1"])
def test_impossible_skew_is_refused(skew: str) -> None:
    with pytest.raises(ConfigError, match=r"--skew = .*must be between 1 and 8"):
        scenarios_of(SMALL, None, skew)


def test_a_load_is_a_trace_a_skew_or_what_the_model_suggests(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    synthetic_trace(SyntheticSpec(kind="uniform", num_experts=16, num_records=4)).save(path)
    names = [scenarios_of(SMALL, *load)[0].name for load in ((path, None), (None, "strong"), (None, None))]
    assert names == ["trace, median record", "--skew strong: hottest expert 6x", scenarios_from_model(SMALL)[0].name]
    with pytest.raises(ConfigError, match=r"^--parallel-skew = 'lots': must be a number or one of even, mild"):
        scenarios_of(SMALL, None, "lots", "--parallel-")


def test_a_trace_must_have_the_models_experts() -> None:
    trace = synthetic_trace(SyntheticSpec(kind="uniform", num_experts=32, num_records=4))
    with pytest.raises(ConfigError, match="has 32 experts, the model has 16"):
        scenarios_from_trace(SMALL, trace)


def test_a_traces_worst_record_is_worse() -> None:
    spec = SyntheticSpec(kind="burst", num_experts=16, num_records=40, skew=0.5, num_layers=6)
    median, worst = scenarios_from_trace(SMALL, synthetic_trace(spec))
    assert worst.share_PE.max() > median.share_PE.max()
    assert median.share_PE.shape == (4, 16)


def test_balancing_lowers_the_busiest_rank_and_loses_no_token() -> None:
    loads = LoadModel(scenarios_from_skew(SMALL, 5.0, "x"))
    plain = loads.after_balancing(Balance(8, 2, 0, False))[0]
    homes = loads.after_balancing(Balance(8, 2, 0, True))[0]
    copies = loads.after_balancing(Balance(8, 2, 1, True))[0]
    assert plain.hot >= homes.hot > copies.hot
    assert copies.hot < 1.2
    for load in (plain, homes, copies):
        for counts in load.counts_P:
            assert counts.tokens_R.sum() == pytest.approx(8)  # a unit per rank
            assert counts.source_tokens == pytest.approx(1.0)


def test_groups_of_the_routing_stay_on_their_node() -> None:
    """With a group for each node the busier node stays as busy as it is, and replicas even out its ranks alone."""
    scenarios = scenarios_from_skew(SMALL, 5.0, "x")
    free, limited = (
        LoadModel(scenarios, num_groups=groups).after_balancing(Balance(8, 2, 1, True)) for groups in (1, 2)
    )
    assert limited[0].hot > free[0].hot
    for load, part in zip(limited[0].counts_P, scenarios[0].share_PE, strict=True):
        of_nodes = load.tokens_R.reshape(2, 4).sum(axis=1)
        np.testing.assert_allclose(of_nodes, 8 * part.reshape(2, 8).sum(axis=1), rtol=1e-3)


def test_what_is_assumed_depends_on_the_router() -> None:
    assert "a balanced router" in scenarios_from_model(SMALL)[0].name
    free = replace(SMALL, moe=replace(SMALL.moe, balancing="none"))
    assert scenarios_from_model(free)[0].share_PE.max() > scenarios_from_model(SMALL)[0].share_PE.max()


def test_layers_and_records_without_assignments_are_left_out() -> None:
    """A dense first layer, an empty second record, and a third record in which one layer routed nothing."""
    experts = SMALL.moe.experts
    counts = np.zeros((3, 3, 1, experts), np.uint32)
    counts[0, 1:], counts[2, 2] = np.arange(1, experts + 1), 5
    trace = RoutingTrace(counts=counts, iteration=np.arange(3), layer=np.arange(3), notes=("as imported",))
    found = scenarios_from_trace(SMALL, trace)
    for scenario in found:
        np.testing.assert_allclose(scenario.share_PE.sum(axis=1), 1)
        assert scenario.notes == (
            "as imported",
            "2 of 3 records and 2 of 3 layers have assignments, the others are left out",
        )
    assert [len(scenario.share_PE) for scenario in found] == [1, 1]  # of the even record, which is the calmer one


@pytest.mark.parametrize(("ep", "nodes", "homes"), [(1, 1, False), (4, 1, True), (8, 2, True), (16, 4, False)])
def test_homes_alone_have_the_flow_of_an_equal_split(ep: int, nodes: int, homes: bool) -> None:
    loads = LoadModel(scenarios_from_skew(SMALL, 3.0, "x"), replace(CLUSTER, levels=(POD,)))
    balance = Balance(ep, nodes, 0, homes)
    share_E = loads.scenarios[0].share_PE[0]
    counts_E = np.rint(share_E * SOURCE_TOKENS).astype(np.int64)
    slots_RS = loads._homes(counts_E, balance) if homes else np.arange(16).reshape(ep, -1)
    flow = LayerFlow.equal_split(np.broadcast_to(counts_E, (ep, 16)), slots_RS, nodes)
    expected = LayerCounts.of(flow, [POD.nodes * (ep // nodes)]).scaled(1.0 / counts_E.sum())
    found = loads.after_balancing(balance)[0].counts_P[0]
    for name, value in vars(expected).items():
        mine = getattr(found, name)
        if isinstance(value, HopCounts):
            mine, value = vars(mine), vars(value)
        np.testing.assert_equal(mine, value, err_msg=name)
