"""The training benchmark as a program: short runs, their files, and that nothing is repeated. Not its speeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import bench_train
from tests.support.synthetic import SyntheticSpec, synthetic_trace

pytestmark = [pytest.mark.dist, pytest.mark.long]


def test_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.npz", tmp_path / "out"
    spec = SyntheticSpec(kind="drifting", num_records=8, num_layers=1, num_sources=2, num_experts=4, skew=1.5)
    synthetic_trace(spec).save(trace)
    arguments = ["--trace", str(trace), "--out", str(out), "--ep", "2", "--rounds", "1", "--steps", "7", "--first", "1"]
    variants = ["ideal", "exact", "ultraep", "smartmoe2023"]
    arguments += ["--hidden", "64", "--ffn", "64", "--tokens", "64", "--variants", *variants]
    bench_train.main(arguments)
    printed = capsys.readouterr()
    assert "round 1 of 1: ultraep done" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["variant", *variants]
    found = json.loads((out / "summary.json").read_text())["variants"]
    for row in found.values():
        assert row["mean_ms"][0] <= row["busiest_ms"][0]
        assert 0 < row["experts_share"] < 1
        assert 0 < row["of_ideal"]["predicted"] < 1.01  # tokens that stay on their rank travel nowhere
    assert found["ideal"]["max_over_mean_tokens"] == 1.0
    contiguous = bench_train.contiguous_balance(
        bench_train.as_routed(bench_train.load_trace(out / "as-recorded.npz"), 2, shape(out))
    )
    assert all(1 <= found[name]["max_over_mean_tokens"] < contiguous for name in ("ultraep", "smartmoe2023"))
    # Again: all runs are there, so none is made.
    bench_train.main(arguments)
    again = capsys.readouterr()
    assert again.err == ""
    assert json.loads((out / "summary.json").read_text())["variants"] == found


def shape(out: Path) -> bench_train.Shape:
    settings = json.loads((out / "settings.json").read_text())
    return bench_train.Shape(**{name: settings[name] for name in bench_train.Shape.__dataclass_fields__})
