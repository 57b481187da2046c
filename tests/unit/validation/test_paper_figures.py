"""The settings of the paper's figures: which strategies compete, and what online placement makes of a trace."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.spec.cluster import load_cluster_spec
from scripts import paper_figures
from scripts.paper.online import EVEN, INTERVALS, OURS, PAPER, STATIC, Online, online
from scripts.paper.plot import draw
from scripts.paper.strategies import choices, strategies
from scripts.validation.fit import fit
from scripts.validation.measured import run_of
from tests.support.synthetic import SyntheticSpec, synthetic_trace
from tests.unit.validation.test_fit import CLUSTERS, ROW, as_row

V100 = load_cluster_spec(Path("v100-pcie"))


@pytest.fixture(scope="module")
def found() -> Online:
    """A steady, skewed load, so that what is learned from history holds."""
    spec = SyntheticSpec(
        kind="lognormal", num_records=14, num_layers=2, num_sources=4, num_experts=16, micro_batches=1, seed=1
    )
    return online(synthetic_trace(spec), 4, V100, ExpertShape(hidden=256, ffn=512, gated=False))


def test_every_policy_prices_every_record_and_layer(found: Online) -> None:
    policies = [(name, interval) for name in (PAPER, OURS) for interval in INTERVALS]
    assert set(found.seconds) == {(STATIC, 0), *policies, (EVEN, 0)}
    assert {seconds.shape for seconds in found.seconds.values()} == {(14, 2)}
    often = found.seconds[PAPER, INTERVALS[0]]
    assert (often == found.seconds[STATIC, 0])[0].all()  # nothing is known before the first record
    assert not (often == found.seconds[STATIC, 0])[-1].any()
    assert found.seconds[EVEN, 0].sum() < found.seconds[STATIC, 0].sum()


def test_a_speedup_is_the_static_time_over_the_policys() -> None:
    static, other = np.array([[4.0, 2.0], [4.0, 2.0]]), np.array([[4.0, 2.0], [1.0, 1.0]])
    found = Online(
        iteration=np.array([1, 11]), layer=np.array([0, 6]), seconds={(STATIC, 0): static, (OURS, 10): other}
    )
    assert found.speedup((OURS, 10)) == 12 / 8
    assert found.speedup((OURS, 10), after=11) == 6 / 2
    assert found.speedup((OURS, 10), layer=6) == 4 / 3


def test_the_plot_is_the_same_file_twice(found: Online, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_strategies_divide_the_model_and_fit_into_memory() -> None:
    run = run_of(as_row({**ROW, "system": "fastmoe"}))
    sizes = {(one.parts[0].spec.pp, one.parts[0].spec.ep) for one in strategies(run, V100)}
    assert (1, 16) in sizes
    assert all(4 % pp == 0 and 16 % (pp * ep) == 0 for pp, ep in sizes)
    small = replace(V100, gpu=replace(V100.gpu, memory_bytes=6e9))
    assert len(list(strategies(run, small))) < len(sizes)


def test_the_choice_is_compared_with_fastmoe_and_the_fastest_measured() -> None:
    rows = [{**ROW, "system": "fastmoe", "median_ms_skip10": "900"}, {**ROW, "pp": "2", "ep": "8"}]
    rows.append({**ROW, "system": "deepspeed", "median_ms_skip10": "1"})  # another code base does not compete
    model = fit([], CLUSTERS)
    (choice,) = choices([run_of(as_row({**row, "gate": "naive"})) for row in rows], model)
    assert (choice.baseline_s, choice.measured_s, choice.capacity) == (0.9, 0.9, math.inf)
    assert choice.even_s < choice.predicted_s
    assert choice.predicted_s <= model.predict(run_of(as_row(rows[1]))).total_s


def test_nothing_asked_for_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_figures.main([]) == 2
    assert "--runs" in capsys.readouterr().err
