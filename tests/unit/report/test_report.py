"""`smartmoe report`: one file that needs nothing else, with what the run directory holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_smartmoe.cli.main import main
from megatron_smartmoe.report.binning import MOST_BINS, loads_of
from megatron_smartmoe.report.run_record import read_run
from megatron_smartmoe.spec.trace import RoutingTrace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def decision(iteration: int, kind: str, changes: list[list[int]], **more: object) -> dict[str, object]:
    given: dict[str, object] = {
        "taken": True,
        "why": "pays <b>: 2.0 ms",
        "group": -1,
        "before": "a",
        "after": "b",
        "inputs": "c",
    }
    return {"iteration": iteration, "kind": kind, "changes": changes, "predicted_gain_s": 0.002, **given, **more}


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trace_of(records: int, layers: int = 2, experts: int = 4, hot_at: int | None = None) -> RoutingTrace:
    """Even loads of two sources, and one record in which expert 0 has all but everything."""
    counts = np.full((records, layers, 2, experts), 10, dtype=np.int64)
    if hot_at is not None:
        counts[hot_at, :, :, 0] = 1000
    return RoutingTrace(counts=counts, iteration=np.arange(1, records + 1), layer=np.arange(layers))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two layers of four experts on two ranks with a spare slot: one move, its review, one replica."""
    run = tmp_path / "some run"
    run.mkdir()
    losses: list[dict[str, object]] = [
        {"iteration": i, "lm loss": 7 - i / 10, "seconds_per_step": 0.5} for i in (1, 10, 20)
    ]
    write_lines(run / "metrics.jsonl", [*losses, {"iteration": 20, "validation": {"lm loss": 5.1}}])
    moved = [[0, 0, 1, 1, 2], [0, 1, 0, 2, 1]]
    move = {"name": "move 1 <i> of layer 2", "chosen": True, "layer": 1, "gain_s": 0.002, "cost_s": 1.0}
    prices = {"candidates": [move], "horizon_iterations": 100, "margin": 2.0}
    refused = decision(15, "homes", [[1, 0, 0, 0, 3], [1, 0, 2, -1, 1]], taken=False, why="does not pay", **prices)
    kept = decision(18, "review", [], realised_gain_s=0.001, why="found 1.0 ms/iter on the loads since: kept")
    write_lines(run / "smartmoe.jsonl", [decision(5, "homes", moved), refused, kept])
    write_lines(run / "replicas-stage0-group0.jsonl", [decision(6, "replicas", [[1, 1, 2, -1, 0]])])
    balance = {"layers": [0, 1], "homes": [[1.5, 1.8], [1.2, 1.1]], "split": [[1.0, 1.1], [1.0, 1.0]]}
    write_lines(run / "balance-stage0-group0.jsonl", [{"iteration": 10, **balance, "copies": [[1, 2], [1, 1]]}])
    (run / "arguments.txt").write_text(
        "  expert_model_parallel_size ...................... 2\n"
        "  num_experts ..................................... 4\n"
        "  smartmoe_record_trace ........................... None\n"
        "  smartmoe_spare_slots ............................ 1\n"
    )
    return run


def test_what_is_read(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.placement is not None
    assert run.placement.slots_LRS.tolist() == [[[0, 2, -1], [1, 3, -1]], [[0, 1, -1], [2, 3, 0]]]
    assert run.balance[0].homes.tolist() == [1.8]
    assert run.balance[0].replicas is not None
    assert run.balance[0].replicas.tolist() == [1.5]
    assert run.metrics["validation loss"].value.tolist() == [5.1]
    assert not run.is_finished


def test_the_page_stands_alone_and_says_what_happened(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace_of(30).save(run_dir / "trace.npz")
    assert main(["report", str(run_dir), "--trace", str(run_dir / "trace.npz")]) == 0
    assert capsys.readouterr().out == f"report: {run_dir / 'report.html'}\n"
    text = (run_dir / "report.html").read_text()
    assert "<title>some run: smartmoe report</title>" in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text), "something is loaded from elsewhere"
    assert "<script" not in text
    assert 'http-equiv="refresh"' not in text
    assert text.count('role="img" aria-label="') >= 3
    assert text.count('<img class="heat"') == 4  # experts and ranks of two layers
    assert text.count("alt=") == text.count("<img")
    assert "pays &lt;b&gt;: 2.0 ms" in text, "texts of the log are no markup"
    iteration = '<td class="number" data-label="iteration">15</td>'  # on a phone, a row is a list with these labels
    assert f'<tr class="refused">{iteration}<td>homes</td><td>1 expert</td><td>refused</td>' in text
    assert '+2.000</td><td class="number" data-label="found, ms:">+1.000</td>' in text
    assert text.count('class="chart broad"') == text.count('class="chart narrow"') > 0
    assert "&gt; move 1 &lt;i&gt; of layer 2  saves +2.000 ms per iteration, costs 1000.000 ms once\n" in text
    assert "a gain counts over 100 iterations, and must be more than 2 times the cost</details>" in text
    assert text.count("<summary>candidates</summary>") == 1
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(target in ids for target in re.findall(r'href="#([^"]+)"', text))


def write_account(run: Path, busiest: float, **header: object) -> None:
    """Twelve steps of two ranks whose experts take 0.1 ms a token; the first rank computes `busiest` tokens."""
    known = {"version": 1, "basis": "cpu", "stages": [0, 0], "micro_batches": 1, "virtual": 1}
    lines: list[dict[str, object]] = [known | header]
    memory = {"rank": 1, "peak_bytes": 3 << 30, "limit_bytes": 8 << 30, "planned_bytes": {"weights": 1 << 30}}
    for iteration in range(1, 13):
        tokens = [busiest, 2000 - busiest]
        seconds = [[0.1, 0.02, rows * 1e-4, 0, 0.005, 0] for rows in tokens]
        counts = [[rows, 4, 2, 500, 0, max(tokens), 4, 500] for rows in tokens]
        lines.append({"iteration": iteration, "iterations": 1, "seconds": seconds, "counts": counts})
    lines[-1] |= {"tokens_per_second": 1000.0, "model_tflops_per_rank": 0.5, "mfu": 0.25, "memory": memory}
    write_lines(run / "account.jsonl", lines)


def test_where_a_step_goes_is_shown_against_the_ideal(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ideal = tmp_path / "ideal"
    shutil.copytree(run_dir, ideal)
    write_account(run_dir, 1500)
    write_account(ideal, 1000)
    assert main(["report", str(run_dir), "--ideal", str(ideal)]) == 0
    assert "step 275.0 ms" in (told := capsys.readouterr().out)
    assert "81.8% of the force-balanced ideal reached" in told
    text = (run_dir / "report.html").read_text()
    for row in (
        '<th scope="row">residual imbalance</th><td class="number">50.00</td><td class="number">18.2%</td><td>modelled',
        '<th scope="row">force-balanced ideal</th><td class="number">225.00</td>',
        '<th scope="row">unexplained</th><td class="number">0.00</td>',
        '<th scope="row">planned: weights</th><td class="number">1.000</td>',
        '<th scope="row">MFU of the cluster file&#39;s peak, median</th><td class="number">25.0%</td>',
    ):
        assert row in text


def test_an_account_without_an_ideal_shows_what_balance_would_save(run_dir: Path) -> None:
    write_account(run_dir, 1500)
    assert main(["report", str(run_dir)]) == 0
    text = (run_dir / "report.html").read_text()
    assert "against the mean rank of this run" in text
    assert "unexplained" not in text


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"version": 2}, "version = 2: is not version 1, which this release reads. Read it with the release"),
        ({"stages": [0]}, "has rows of other ranks or columns"),
        ({"basis": "gpu"}, "--ideal"),
    ],
)
def test_an_account_that_does_not_fit_is_refused(
    header: dict[str, object], expected: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "ideal")
    write_account(run_dir, 1500)
    write_account(tmp_path / "ideal", 1000, **header)
    assert main(["report", str(run_dir), "--ideal", str(tmp_path / "ideal")]) == 2
    assert expected in capsys.readouterr().err


def test_an_ideal_needs_measured_steps(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_account(run_dir, 1500)
    assert main(["report", str(run_dir), "--ideal", str(tmp_path)]) == 2
    expected = (
        f"--ideal = '{tmp_path}': has no account.jsonl. Run the same launch with --moe-router-force-load-balancing"
    )
    assert expected in capsys.readouterr().err


def test_two_runs_are_compared(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "other")
    assert (
        main(["report", str(run_dir), "--compare", str(tmp_path / "other"), "--output", str(tmp_path / "two.html")])
        == 0
    )
    text = (tmp_path / "two.html").read_text()
    assert "<h1>some run and other</h1>" in text
    assert "training, other" in text
    assert not (run_dir / "report.html").exists()


def test_a_run_that_trains_is_written_again_until_it_ends(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []

    def sleep(seconds: float) -> None:
        pages.append((run_dir / "report.html").read_text())
        if len(pages) == 2:
            (run_dir / "summary.json").write_text('{"iterations": 20}')

    monkeypatch.setattr("megatron_smartmoe.cli.report.time.sleep", sleep)
    assert main(["report", str(run_dir), "--live", "7"]) == 0
    assert len(pages) == 2
    assert all('http-equiv="refresh" content="7"' in page and "20 so far" in page for page in pages)
    assert "refresh" not in (run_dir / "report.html").read_text()


def test_of_a_trace_it_shows_what_balancing_would_have_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = np.full((40, 1, 4, 8), 1000, dtype=np.int64)
    counts[..., :2] = 9000
    path = tmp_path / "stock.npz"
    RoutingTrace(counts=counts, iteration=np.arange(1, 41), layer=np.array([3])).save(path)
    assert main(["report", str(path), "--ep", "4", "--spare-slots", "1"]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'stock.html'}\n"
    text = (tmp_path / "stock.html").read_text()
    assert "<h1>stock.npz, simulated</h1>" in text
    assert "Simulated: what smartmoe simulate predicts for 4 ranks with 1 spare slot each" in text
    # Two hot experts on the first rank: 18 of 24 parts, mean 6.
    assert 'max / mean tokens per rank, without balancing</th><td class="number">3.000</td>' in text
    assert 'max / mean tokens per rank, with smartmoe</th><td class="number">1.000</td>' in text
    assert '<tr><th scope="row">4</th><td class="number">3.000</td><td class="number">1.000</td>' in text
    for arguments, line in (
        (["--ep", "3"], "--ep = 3: must divide the trace's 8 experts. Every rank has as many experts: --ep 1."),
        (["--ep", "4", "--compare", "x"], "--compare = 'x': is for a run directory. Remove --compare."),
        ([], "is not a directory"),
    ):
        assert main(["report", str(path), *arguments]) == 2
        assert line in capsys.readouterr().err


def test_a_last_line_that_is_being_written_is_left_out(run_dir: Path) -> None:
    with (run_dir / "smartmoe.jsonl").open("a") as file:
        file.write('{"iteration": 19, "ki')
    assert len(read_run(run_dir).decisions) == 3


def test_bins_keep_the_worst_moment() -> None:
    (load, _) = loads_of(trace_of(1000, hot_at=777), num_ranks=2)
    assert len(load.starts) == MOST_BINS
    (at,) = np.nonzero(load.worst_B > 1.5)[0]
    assert load.starts[at] <= 778 < load.starts[at + 1]
    # 2,000 tokens for expert 0, 20 for each of three others: the first rank has 2,020 of 2,060, mean 1,030.
    assert load.worst_B[at] == pytest.approx(2020 / 1030)
    assert load.expert_BE[at].tolist() == pytest.approx([4 * 2000 / 2060, *[4 * 20 / 2060] * 3])


@pytest.mark.slow
def test_a_long_run_of_a_large_model_stays_small(run_dir: Path) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 255, size=(5000, 60, 1, 256), dtype=np.uint8)
    counts = np.repeat(counts, 2, axis=2)
    trace = RoutingTrace(counts=counts, iteration=np.arange(5000), layer=np.arange(60))
    found = loads_of(trace, num_ranks=64)
    from megatron_smartmoe.report.charts import heat_map

    size = sum(len(heat_map(values, 4.0)) for load in found for values in (load.expert_BE, load.rank_BR))
    assert size < 8e6, "of the page's 10 MB"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "RUN = 'nowhere': is not a directory"),
        (["."], "RUN = '.': has no metrics.jsonl: it is no run directory"),
        (["{run}", "--output", "no/page.html"], "there is no directory no. Run mkdir -p no."),
        (["{run}", "--live", "0"], "--live = 0: must be from 1 to 3600 seconds"),
        (["{run}", "--trace", "no.npz"], "--trace = 'no.npz': does not exist"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], line: str, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert main(["report", *(argument.format(run=run_dir) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_a_decision_is_explained(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Experts 0 and 1 are hot in the first layer: one rank has them both, at 160 of 200 tokens; moved apart, each has 80
    # and one of the others 20. In the other layer nothing moves.
    counts = np.full((30, 2, 2, 4), 10, dtype=np.int64)
    counts[:, 0, :, :2] = 40
    trace = RoutingTrace(counts=counts, iteration=np.arange(1, 31), layer=np.arange(2))
    trace.save(run_dir / "trace.npz")
    assert main(["explain", str(run_dir), "--iteration", "5", "--trace", str(run_dir / "trace.npz")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("some run, iteration 5\n\nhomes (which rank owns which expert): taken\n")
    assert "  changes    layer 1: expert 2 at home on rank 0; expert 1 at home on rank 1\n" in text
    assert "             predicted to save +2.000 ms per iteration\n" in text
    load = "busiest rank over the mean by homes: 1.600 -> 1.000 on the 20 iterations before, 1.600 -> 1.000 on the 20"
    assert load in text
    assert "  outcome    iteration 18: found 1.0 ms/iter on the loads since: kept\n" in text
    assert "predicted +2.000 ms per iteration, found +1.000 ms per iteration on the loads since\n" in text
    assert "  candidates not recorded: the run is of an earlier version\n" in text
    assert main(["explain", str(run_dir), "--iteration", "6"]) == 0
    assert "  changes    layer 2: expert 0 as a replica on rank 1\n" in capsys.readouterr().out
    assert main(["explain", str(run_dir), "--iteration", "15", "--layer", "1"]) == 0
    text = capsys.readouterr().out
    assert "  verdict    refused: does not pay\n" in text
    assert "  changes    no expert moves\n" in text
    assert "no counts were recorded" in text
    stays = {
        "iteration": 9,
        "setting": "homes0-K0-off-ov1",
        "reason": "margin",
        "step_s": 0.5,
        "noise_s": 0.01,
        "timed": 8,
    }
    write_lines(run_dir / "pool.jsonl", [stays])
    assert main(["explain", str(run_dir), "--iteration", "9"]) == 0
    text = capsys.readouterr().out
    assert "homes0-K0-off-ov1 stays\n  inputs     a step took 500.0 ms: median of 8, give or take 10.0 ms\n" in text
    assert text.endswith("  verdict    no other setting is predicted to save enough\n")
    assert main(["explain", str(run_dir), "--iteration", "7"]) == 2
    error = capsys.readouterr().err
    assert error == ("smartmoe explain: --iteration = 7: nothing was decided then. Decisions near it: 5, 6, 15, 18.\n")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_draws_it_without_errors(run_dir: Path, tmp_path: Path, width: int) -> None:
    trace_of(30, hot_at=3).save(run_dir / "trace.npz")
    main(["report", str(run_dir), "--trace", str(run_dir / "trace.npz")])
    picture = tmp_path / "page.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={picture}"]
    done = subprocess.run([*command, (run_dir / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, "the page has errors"
    pixels = matplotlib.image.imread(picture)[..., :3]
    colours = {tuple(colour) for colour in np.unique((pixels * 255).astype(int).reshape(-1, 3), axis=0).tolist()}
    assert {(213, 94, 0), (0, 114, 178)} <= colours, "no curve"
    assert any(red > 240 and 220 < green < 240 and blue < 80 for red, green, blue in colours), "no hot spot"
