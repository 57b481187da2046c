"""The training benchmark's arithmetic: ratios with intervals, predictions, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.simulate.baselines.greedy import SmartMoE2023
from scripts import bench_train
from scripts.training_bench.folder import check_settings
from scripts.training_bench.peers import RuleInExecutor, whole
from scripts.training_bench.predict import as_routed, layer_seconds_of
from scripts.training_bench.statistics import ratio
from scripts.training_bench.variants import VARIANTS, Shape
from tests.support.synthetic import SyntheticSpec, synthetic_trace

SHAPE = Shape(layers=1, hidden=512, ffn=512, tokens=512, experts=8, top_k=2, micro_batches=1)


def test_a_ratio_is_the_median_over_paired_rounds() -> None:
    rounds = [np.array([2.0, 2.0, 2.0]), np.array([4.0, 4.0, 4.0]), np.array([9.0, 9.0, 9.0])]
    unit = [np.array([1.0, 1.0, 1.0])] * 3
    found = ratio(rounds, unit)
    assert found.value == 4.0
    assert (found.low, found.high) == (2.0, 9.0)
    assert ratio(rounds, rounds).low == ratio(rounds, rounds).high == 1.0


def test_one_round_has_no_interval() -> None:
    found = ratio([np.array([2.0, 3.0])], [np.array([1.0, 1.0])])
    assert found.value == 2.5
    assert np.isnan(found.low)


def test_rounds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    base = [1 + 0.01 * rng.standard_normal(10) for _ in range(5)]
    apart = [run * factor for run, factor in zip(base, (0.8, 1.0, 1.2, 1.4, 0.9), strict=True)]
    near, far = ratio(base, base[::-1]), ratio(apart, base)
    assert far.high - far.low > 5 * (near.high - near.low)


def test_predictions_follow_the_balance() -> None:
    """On the CPU's cluster file experts are most of a layer, so the order is that of the busiest rank's tokens."""
    spec = SyntheticSpec(
        kind="drifting", num_records=10, num_layers=1, num_sources=8, num_experts=8, tokens_per_source=1024, skew=1.5
    )
    trace = synthetic_trace(spec)
    routed = as_routed(trace, 4, SHAPE)
    assert (routed.counts.sum(axis=3) == SHAPE.tokens * SHAPE.top_k).all()
    seconds = layer_seconds_of(routed, 4, SHAPE, list(VARIANTS), 5, Path("cpu"))
    assert list(seconds) == list(VARIANTS)
    assert seconds["off"] == seconds["stock"] > seconds["history"]
    assert seconds["ideal"] <= 1.01 * min(seconds.values())  # tokens that stay on their rank travel nowhere


def test_whole_tokens_keep_every_sum() -> None:
    tokens_ER = np.array([[1.5, 1.5], [0.25, 2.75]])
    assert whole(tokens_ER, np.array([3, 3])).tolist() == [[2, 1], [0, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "5"], "--steps 5: must be more than the 5"), (["--ep", "0"], "--ep 0: must be at least 1")],
)
def test_numbers_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_train.parse(["--trace", "t.npz", "--out", "o", *arguments])
    assert message in capsys.readouterr().err


def test_the_table_has_both_ratios_and_what_the_model_says(tmp_path: Path) -> None:
    args = bench_train.parse(["--trace", "t.npz", "--out", str(tmp_path), "--rounds", "2", "--ep", "64"])
    slow = runs(busiest=[[0.8, 0.8], [0.9, 0.9]], mean=[[0.4, 0.4], [0.45, 0.45]])
    even = runs(busiest=[[0.5, 0.5], [0.5, 0.5]], mean=[[0.4, 0.4], [0.4, 0.4]])
    content = bench_train.summary({"ideal": even, "stock": slow}, {"ideal": 0.1, "stock": 0.3}, args, SHAPE)
    stock: Any = content["variants"]["stock"]
    assert stock["of_ideal"]["value"] == pytest.approx((0.4 / 0.8 + 0.4 / 0.9) / 2)
    assert stock["over_stock"] == {"value": 1.0, "low": 1.0, "high": 1.0, "predicted": 1.0}
    # Half of the ideal's 0.4 s are outside the experts: (0.2 + 0.1) / (0.2 + 0.3).
    assert stock["of_ideal"]["predicted"] == pytest.approx(0.6)
    assert stock["wall_ms"] is None
    lines = bench_train.as_table(content, args, SHAPE).splitlines()
    assert len(lines) == 2 + 1 + 2
    assert "850 (800 to 900)" in lines[-1]


def runs(busiest: list[list[float]], mean: list[list[float]]) -> bench_train.Runs:
    return bench_train.Runs(
        busiest_s=[np.array(run) for run in busiest],
        mean_s=[np.array(run) for run in mean],
        wall_s=[np.array(run) for run in busiest],
        experts=0.5,
        faults=3.0,
        balance=1.0,
    )


def test_another_model_does_not_mix_with_what_the_folder_has(tmp_path: Path) -> None:
    check_settings(tmp_path, {"ep": 8, "steps": 15})
    check_settings(tmp_path, {"ep": 8, "steps": 15})
    with pytest.raises(SystemExit, match="its runs have ep = 8, not 4"):
        check_settings(tmp_path, {"ep": 4, "steps": 15})


def test_training_gets_the_homes_of_a_rule() -> None:
    """Shares of the load, as a forecast has them: the two hot experts part, and training is told that homes change."""
    executor = RuleInExecutor(SmartMoE2023())
    slots_RS = np.arange(4).reshape(2, 2)
    plan = executor.plan_homes(slots_RS, np.array([0.4, 0.4, 0.1, 0.1]), 2)
    assert sorted(sorted(homes) for homes in plan.slots_RS.tolist()) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    assert plan.swaps
    assert executor.plan_homes(plan.slots_RS, np.array([0.4, 0.4, 0.1, 0.1]), 2).swaps == ()
