"""`smartmoe bench-imbalance`: tables, rows and traces; wrong input is one line."""

import json
import re
from pathlib import Path

import pytest

from megatron_smartmoe.cli.main import main
from megatron_smartmoe.spec.trace import load_trace

SMALL = "--experts 16 --top-k 2 --tokens 8192 --ep 4 --steps 6 --warmup 2 --micro-batches 2 --homes-interval 2".split()
SOME = ["--workload", "W1_hot_expert_set,C1_hot_contiguous", "--policy", "none,smartmoe-homes,smartmoe-auto,ultraep"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imbalance")
    files = ["--jsonl", str(folder / "rows.jsonl"), "--markdown", str(folder / "table.md")]
    files += ["--save-traces", str(folder)]
    assert main(["bench-imbalance", *SMALL, *SOME, *files, "--cluster", "h100-sxm,a100-sxm4-80gb"]) == 0
    return folder


def rows_of(results: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (results / "rows.jsonl").read_text().splitlines()]


def test_a_row_per_workload_cluster_and_rule(results: Path) -> None:
    rows = rows_of(results)
    keys = {(row["workload_id"], row["cluster"], row["backend"]) for row in rows}
    assert len(rows) == len(keys) == 2 * 2 * 4
    for row in rows:
        assert sum(row["expert_counts"]) == row["assignments"] == 2 * row["logical_tokens"]  # type: ignore[call-overload, operator]
        assert row["overload_after"] >= 1.0  # type: ignore[operator]
        # Tokens that stay on their rank travel nowhere, which an even load over all experts cannot have.
        assert row["modelled_ms"] >= 0.9 * row["even_load_ms"]  # type: ignore[operator]
        assert (row["spare_slots"] == 0) == (row["backend"] == "smartmoe-homes")
    by_rule = {row["backend"]: row for row in rows if row["workload_id"] == "C1_hot_contiguous"}
    assert by_rule["none"]["overload_after"] == by_rule["none"]["overload_before"]
    assert by_rule["none"]["overload_before"] > 1.5  # type: ignore[operator]
    assert by_rule["smartmoe-homes"]["overload_after"] < by_rule["none"]["overload_after"]  # type: ignore[operator]


def test_the_same_numbers_every_time(results: Path, tmp_path: Path) -> None:
    again = ["--jsonl", str(tmp_path / "rows.jsonl"), "--cluster", "h100-sxm"]
    assert main(["bench-imbalance", *SMALL, *SOME, *again]) == 0
    first = [row for row in rows_of(results) if row["cluster"] == "h100-sxm"]
    second = rows_of(tmp_path)
    for row in (*first, *second):
        del row["plan_ms"]  # measured
    assert first == second


def test_the_table_names_everything(results: Path) -> None:
    text = (results / "table.md").read_text()
    assert text.count("## Compatible series on") == text.count("## Corrected series on") == 2
    assert "on h100-sxm" in text
    assert "on a100-sxm4-80gb" in text
    assert "workloads: C1 hot contiguous" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert sum(line.startswith("| smartmoe-auto |") for line in lines) == 4
    even, *_ = (line for line in lines if line.startswith("| even load, ms |"))
    assert re.match(r"\| even load, ms \| \d+\.\d+ \|", even)


def test_workloads_are_traces(results: Path) -> None:
    trace = load_trace(results / "C1_hot_contiguous.npz")
    assert trace.counts.shape == (6, 1, 4, 2, 16)
    assert trace.meta["source"] == "smartmoe bench-imbalance: corrected/C1_hot_contiguous"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--workload W9", "--workload = 'W9': is not a known workload. Known: W0_balanced"),
        ("--policy best", "--policy = 'best': is not a known policy. Known: smartmoe-homes"),
        ("--ep 3", "--ep = 3: must divide --experts 64. For example: --experts 24."),
        ("--top-k 40", "--top-k = 40: must be at most 32, half of the experts"),
        ("--steps 4 --warmup 4", "--warmup = 4: leaves none of the 4 steps"),
        ("--spare-slots 60", "--spare-slots = 60: must be at most 56"),
        ("--tokens 0", "--tokens = 0: must be from 1 to 1,048,576"),
        ("--jsonl nowhere/rows.jsonl", "there is no directory nowhere"),
        ("--save-traces nowhere", "--save-traces = 'nowhere': is not a directory. Run mkdir -p nowhere."),
        ("--cluster unheard-of", "configuration file = 'unheard-of': is neither a file nor a name in configs/clusters"),
    ],
)
def test_wrong_input_is_one_line(
    given: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench-imbalance", *given.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert line in captured.err
