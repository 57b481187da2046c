"""The fit finds constants that made the times, predicts other sizes with them, and the script writes what it should."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.csv_rows import Row
from scripts.validation import validate_planner
from scripts.validation.fit import PRIORS, Fitted, fit, fit_settings
from scripts.validation.measured import COLUMNS, GateLaw, MeasuredRun, flows_of, popularity, run_of

CLUSTERS = validate_planner.clusters_of([])
ROW = {
    "cluster": "inky",
    "gpus": "16",
    "system": "smartmoe",
    "layers": "4",
    "hidden": "1024",
    "heads": "16",
    "seq": "1024",
    "topk": "2",
    "experts": "16",
    "gate": "naive",
    "capacity": "inf",
    "tp": "1",
    "pp": "1",
    "dp": "16",
    "ep": "16",
    "edp": "1",
    "gbs": "128",
    "mbs": "4",
    "shadow": "OFF",
    "median_ms_skip10": "1000",
}
TRUE = {**{name: prior.middle for name, prior in PRIORS.items()}, "gemm": 0.55, "naive": 1.0, "all_to_all_inter": 0.2}


def as_row(cells: dict[str, str]) -> Row:
    return Row(where="runs.csv:2", cells=cells)


def rows(layers: int = 4) -> list[dict[str, str]]:
    """Runs whose times the model itself made from TRUE."""
    found = []
    for capacity, gate in (("1.2", "gshard"), ("4.8", "naive"), ("inf", "naive")):
        for pp, ep in ((1, 16), (2, 8), (4, 2)):
            row = {**ROW, "layers": str(layers), "capacity": capacity, "gate": gate, "pp": str(pp), "ep": str(ep)}
            row["dp"] = str(16 // pp)
            seconds = Fitted(TRUE, {}, CLUSTERS).predict(run_of(as_row(row))).total_s
            found.append({**row, "median_ms_skip10": str(seconds * 1e3)})
    return found


def test_a_fit_predicts_what_it_has_not_seen() -> None:
    model = fit([run_of(as_row(row)) for row in rows()], CLUSTERS)
    others = [run_of(as_row(row)) for row in rows(layers=8)]
    errors = [abs(model.predict(run).total_s / run.time_s - 1) for run in others]
    assert np.median(errors) < 0.02
    assert max(errors) < 0.05
    assert model.values["gemm"] == pytest.approx(0.55, rel=0.1)


def test_without_runs_the_priors_hold() -> None:
    assert fit([], CLUSTERS).values == pytest.approx({name: prior.middle for name, prior in PRIORS.items()})


def test_a_row_that_is_not_gpt_is_refused() -> None:
    with pytest.raises(ConfigError, match="only GPT rows can be predicted"):
        run_of(as_row({**ROW, "hidden": "128..1024"}))


def test_popularity_is_capped_where_a_token_cannot_choose_twice() -> None:
    share_E = popularity(GateLaw(4.0), 16, 2)
    assert share_E.sum() == pytest.approx(1.0)
    assert share_E.max() == pytest.approx(0.5)


def test_capacity_drops_and_padding_fills() -> None:
    run = run_of(as_row({**ROW, "capacity": "1.2"}))
    tokens = 4 * 1024 * 2
    for flow in flows_of(run, GateLaw(2.0), 2):
        assert flow.load_ER.sum(axis=1).max() <= 1.2 * tokens * (1 + 1e-9)
    padded = replace(run, system="deepspeed")
    for flow in flows_of(padded, GateLaw(2.0), 2):
        np.testing.assert_allclose(flow.load_ER.sum(axis=1), 1.2 * tokens)


def test_shadowing_moves_no_token_and_replicates_the_hottest() -> None:
    run: MeasuredRun = run_of(as_row({**ROW, "hidden": "256", "system": "fastermoe", "shadow": "ON"}))
    plain = flows_of(replace(run, shadow=False), GateLaw(2.0), 2)
    for before, after in zip(plain, flows_of(run, GateLaw(2.0), 2), strict=True):
        assert after.load_ER.sum() == pytest.approx(before.load_ER.sum())
        np.testing.assert_allclose(after.traffic_RR.sum(axis=0), after.load_ER.sum(axis=0))
        assert after.load_ER.sum(axis=0).max() <= before.load_ER.sum(axis=0).max()


def test_regret_is_what_the_first_choice_costs() -> None:
    runs = [replace(run_of(as_row({**ROW, "ep": ep})), time_s=s) for ep, s in (("16", 2.0), ("8", 1.0))]
    (setting,) = fit_settings(runs, [0.5, 0.6])
    assert setting.regret == 1.0
    assert setting.first_predicted == runs[0].label


def test_the_script_writes_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows()[6:], {**ROW, "hidden": "128..1024"}])
    out = tmp_path / "out.json"
    assert validate_planner.main(["--fit", str(path), "--predict", str(path), "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["rows"] == 3
    assert content["median_ape"] < 0.05
    assert {setting["regret"] for setting in content["settings"]} == {0.0}
    assert set(content["settings"][0]) >= {"key", "best_measured", "first_predicted", "regret"}
    assert len(content["left_out"]) == 2  # once in each file


def test_the_script_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("cluster,gpus\ninky,16\n")
    assert validate_planner.main(["--fit", str(path), "--predict", str(path), "--json", str(tmp_path / "o")]) == 2
    assert "lacks column system" in capsys.readouterr().err
