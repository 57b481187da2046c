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
from scripts.validation.measured import MeasuredRun, run_of
from scripts.validation.routed import GateLaw, flows_of, popularity
from scripts.validation.splits import held_out

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
    "ep": "16",
    "gbs": "128",
    "mbs": "4",
    "shadow": "OFF",
    "median_ms_skip10": "1000",
}
SWIN = {"layers": "2,2,18,2 (10 MoE)", "hidden": "128..1024", "heads": "", "seq": "", "gbs": "4096", "mbs": "16"}
TRUE = {**{name: prior.middle for name, prior in PRIORS.items()}, "gemm": 0.55, "naive": 1.0, "card": 0.3}


def as_row(cells: dict[str, str]) -> Row:
    return Row(where="runs.csv:2", cells=cells)


def rows(layers: int = 4) -> list[dict[str, str]]:
    """Runs whose times the model itself made from TRUE."""
    found = []
    for capacity, gate in (("1.2", "gshard"), ("4.8", "naive"), ("inf", "naive")):
        for pp, ep in ((1, 16), (2, 8), (4, 2)):
            row = {**ROW, "layers": str(layers), "capacity": capacity, "gate": gate, "pp": str(pp), "ep": str(ep)}
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


def test_an_image_row_is_four_models_with_experts_in_the_last_two() -> None:
    run = run_of(as_row({**ROW, **SWIN}))
    assert run.vision
    assert [part.model.hidden for part in run.parts] == [128, 256, 512, 1024]
    assert [part.model.num_moe_layers for part in run.parts] == [0, 0, 9, 1]
    tokens = [part.spec.micro_batch * part.model.seq_length for part in run.parts]
    assert tokens == [16 * 56 * 56, 16 * 28 * 28, 16 * 14 * 14, 16 * 7 * 7]
    assert {part.spec.micro_batches for part in run.parts} == {16}
    step = Fitted(TRUE, {}, CLUSTERS).predict(run)
    assert step.total_s == pytest.approx(sum(seconds for _, seconds in step.terms()))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"hidden": "128..1000"}, "must be the first and the last of 4 widths that double"),
        ({"layers": "24"}, "must be the layers of up to 4 stages"),
        ({"layers": "2,2,18,2 (40 MoE)"}, "more layers with experts than every other one"),
    ],
)
def test_an_image_row_whose_sizes_contradict_is_refused(cells: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(as_row({**ROW, **SWIN, **cells}))


def test_popularity_is_capped_where_a_token_cannot_choose_twice() -> None:
    share_E = popularity(GateLaw(4.0), 16, 2)
    assert share_E.sum() == pytest.approx(1.0)
    assert share_E.max() == pytest.approx(0.5)


def test_capacity_drops_and_padding_fills() -> None:
    run = run_of(as_row({**ROW, "capacity": "1.2"}))
    tokens = 4 * 1024 * 2
    for flow in flows_of(run, run.parts[0], GateLaw(2.0), 2):
        assert flow.load_ER.sum(axis=1).max() <= 1.2 * tokens * (1 + 1e-9)
    padded = replace(run, system="deepspeed")
    for flow in flows_of(padded, run.parts[0], GateLaw(2.0), 2):
        np.testing.assert_allclose(flow.load_ER.sum(axis=1), 1.2 * tokens)


def test_shadowing_moves_no_token_and_replicates_the_hottest() -> None:
    run: MeasuredRun = run_of(as_row({**ROW, "hidden": "256", "system": "fastermoe", "shadow": "ON"}))
    plain = flows_of(replace(run, shadow=False), run.parts[0], GateLaw(2.0), 2)
    for before, after in zip(plain, flows_of(run, run.parts[0], GateLaw(2.0), 2), strict=True):
        assert after.load_ER.sum() == pytest.approx(before.load_ER.sum())
        np.testing.assert_allclose(after.traffic_RR.sum(axis=0), after.load_ER.sum(axis=0))
        assert after.load_ER.sum(axis=0).max() <= before.load_ER.sum(axis=0).max()


def test_online_placement_evens_out_and_computes_what_was_dropped() -> None:
    row = {**ROW, "ep": "4", "experts": "32", "capacity": "1.2", "dynamic": "ON"}
    run = run_of(as_row(row))
    part, tokens = run.parts[0], 4 * 1024 * 2 * 4
    for flow in flows_of(run, part, GateLaw(2.0), 1):
        assert flow.load_ER.sum() == pytest.approx(tokens)  # the last expert has what the capacity dropped
        np.testing.assert_array_equal((flow.load_ER > 0).sum(axis=0), 8)
    naive = run_of(as_row({**row, "capacity": "inf"}))
    placed, plain = (flows_of(one, part, GateLaw(0.4), 1) for one in (naive, replace(naive, dynamic=False)))
    worst = [max(flow.load_ER.sum(axis=0).max() for flow in flows) for flows in (placed, plain)]
    assert worst[0] < worst[1]
    model = Fitted(TRUE, {}, CLUSTERS)
    remapped = model.predict(naive).moe_source_s - model.predict(replace(naive, dynamic=False)).moe_source_s
    assert remapped == pytest.approx(3e-3 * 4 * 2)  # 8,192 assignments in each of 4 layers and 2 micro-batches


def test_broadcasts_of_shadowed_experts_come_in_every_micro_batch() -> None:
    model = Fitted(TRUE, {}, CLUSTERS)
    once, twice = (
        model.predict(run_of(as_row({**ROW, "shadow": "ON", "gate": "naive", "gbs": gbs}))).replicas_s
        for gbs in ("64", "128")
    )
    assert once > 0
    assert twice == pytest.approx(2 * once)


def test_equal_blocks_are_exchanged_faster() -> None:
    run = run_of(as_row({**ROW, "system": "deepspeed", "capacity": "1.2"}))
    slow, fast = (Fitted({**TRUE, "even_exchange": even}, {}, CLUSTERS).predict(run) for even in (1.0, 2.0))
    assert slow.all_to_all_inter_s == pytest.approx(2 * fast.all_to_all_inter_s)


def test_a_network_that_a_cluster_file_knows_is_not_guessed() -> None:
    run, known = run_of(as_row(ROW)), validate_planner.clusters_of(["inky=a100-sxm4-80gb"])
    guessed, given, other = (
        Fitted({**TRUE, **cards}, {}, clusters).predict(run)
        for cards, clusters in (
            ({"card": 0.25}, CLUSTERS),
            ({"card": 0.25, "stated_card": 1.0}, known),
            ({"card": 0.5, "stated_card": 0.25}, known),
        )
    )
    assert given.all_to_all_inter_s < guessed.all_to_all_inter_s
    assert other == guessed


def test_an_image_run_reads_its_images_and_computes_fastmoes_experts_in_fp32() -> None:
    run = run_of(as_row({**ROW, **SWIN, "system": "fastmoe"}))
    slow, base, fast = (
        Fitted({**TRUE, **constants}, {}, CLUSTERS)
        for constants in ({"read_image": 1.5e-3}, {"read_image": 0.5e-3}, {"read_image": 0.5e-3, "gemm": 0.6})
    )
    assert slow.predict(run).total_s - base.predict(run).total_s == pytest.approx(4096 * 1e-3)
    assert fast.predict(run).attention_s < base.predict(run).attention_s
    assert fast.predict(run).moe_gemm_s == base.predict(run).moe_gemm_s
    tutel = replace(run, system="tutel", capacity=1.0)
    assert fast.predict(tutel).moe_gemm_s < base.predict(tutel).moe_gemm_s


def test_regret_is_what_the_first_choice_costs() -> None:
    runs = [replace(run_of(as_row({**ROW, "ep": ep})), time_s=s) for ep, s in (("16", 2.0), ("8", 1.0))]
    (setting,) = fit_settings(runs, [0.5, 0.6])
    assert setting.regret == 1.0
    assert setting.first_predicted == runs[0].label


def test_each_part_is_predicted_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def prior(runs: list[MeasuredRun], clusters: object) -> Fitted:
        asked.append(len(runs))
        return Fitted(TRUE, {}, CLUSTERS)

    monkeypatch.setattr("scripts.validation.splits.fit", prior)
    runs = [run_of(as_row(row)) for row in rows()]
    runs.append(run_of(as_row({**rows()[8], "gpus": "32", "gbs": "256"})))
    found = dict(held_out(runs, CLUSTERS))
    assert list(found) == ["one capacity left out", "one strategy left out", "from 16 GPUs to more"]
    assert asked == [7, 7, 6, 7, 7, 6, 9]
    assert [len(answers.runs) for answers in found.values()] == [10, 10, 1]
    assert found["one capacity left out"].summary()["median_ape"] == pytest.approx(0, abs=1e-9)


def write(path: Path, runs: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(runs)
    return path


def test_the_script_writes_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [{**ROW, "median_ms_skip10": ""}, {**ROW, "hidden": ""}, {**ROW, "ep": "5"}]
    path = write(tmp_path / "runs.csv", [*rows()[6:], *broken])
    out = tmp_path / "out.json"
    assert validate_planner.main(["--fit", str(path), "--predict", str(path), "--json", str(out)]) == 0
    content, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert content["rows"] == 3
    assert content["median_ape"] < 0.05
    assert {setting["regret"] for setting in content["settings"]} == {0.0}
    assert set(content["settings"][0]) >= {"key", "best_measured", "first_predicted", "regret"}
    assert len(content["left_out"]) == 6  # three in each file
    assert f"left out: {path}:5: median_ms_skip10 = '': must be a number above 0" in printed
    assert "left out: 3 rows of --fit, 3 of --predict" in printed


def test_image_runs_that_were_not_fitted_are_predicted_from_the_priors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_planner, "fit", lambda runs, clusters: fit([], clusters))
    fitted, out = write(tmp_path / "gpt.csv", rows()[:1]), tmp_path / "out.json"
    both = write(tmp_path / "both.csv", [rows()[0], {**ROW, **SWIN, "cluster": "other"}])
    assert validate_planner.main(["--fit", str(fitted), "--predict", str(both), "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert (content["rows"], content["images"]["rows"]) == (1, 1)
    printed = capsys.readouterr().out
    assert "images: --fit has no such run, so the priors alone predict" in printed
    assert "cluster other: no file for it, so it is taken for 2x8-a100-sxm4-80gb; --cluster other=YAML" in printed


def test_a_file_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "runs.csv", [{**ROW, "median_ms_skip10": "nan"}])
    assert validate_planner.main(["--fit", str(path), "--predict", str(path), "--json", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "has no run that can be read" in error
    assert "Traceback" not in error


def test_the_script_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("cluster,gpus\ninky,16\n")
    assert validate_planner.main(["--fit", str(path), "--predict", str(path), "--json", str(tmp_path / "o")]) == 2
    assert "lacks column system" in capsys.readouterr().err
