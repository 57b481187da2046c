"""The runner of the GPU check: limits, failures, results and their table; and how a trace is read."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from scripts.gpu import check
from scripts.gpu.check import STEPS, Outcome, Step

RESULT = {"what": "speed", "value": 3.5, "unit": "TFLOP/s"}


def python(name: str, code: str, limit_s: float = 20, needs: str | None = None) -> Step:
    return Step(name=name, limit_s=limit_s, command=("{python}", "-c", code), on_cpu=True, needs=needs)


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "machine", lambda: {"date": "2026-01-01", "commit": "abc1234"})


@pytest.mark.usefixtures("no_machine")
def test_no_step_stops_the_next(tmp_path: Path) -> None:
    steps = [
        python("fails", "raise SystemExit(3)"),
        python("hangs, with a child", HANGING, limit_s=1),
        Step(name="missing", limit_s=5, command=(str(tmp_path / "nothing"),), on_cpu=True),
        python("no program", "", needs="a-program-that-nobody-has"),
        Step(name="for a GPU", limit_s=5, command=("{python}", "-c", "")),
        python("measures", MEASURING),
    ]
    begin = time.monotonic()
    outcomes = check.check(steps, device="cpu", out=tmp_path / "out")
    assert time.monotonic() - begin < 60
    statuses = [one.status for one in outcomes]
    assert statuses[:2] == ["failed: exit status 3", "timed out after 1 s"]
    assert statuses[2].startswith("failed: [Errno 2] No such file or directory")
    assert statuses[3:] == ["skipped: a-program-that-nobody-has is not on PATH", "skipped: needs a GPU", "passed"]
    assert outcomes[-1].results == [RESULT]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["machine"]["commit"] == "abc1234"
    assert [step["status"] for step in written["steps"]] == statuses
    assert "| measures | speed | 3.5 TFLOP/s |" in (tmp_path / "out" / "results.md").read_text()


MEASURING = f"""
print('result: ' + {json.dumps(RESULT)!r})
print('result: {{cut')  # ended within a line
"""
HANGING = f"""
import subprocess, sys, time
subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""


def test_the_table() -> None:
    facts = {"date": "2026-01-01", "GPU, driver, memory": "NVIDIA H200, 580.65, 143771 MiB"}
    outcomes = [
        Outcome(name="grouped GEMM", status="passed", seconds=12.5, results=[RESULT]),
        Outcome(name="kernels, all", status="skipped: needs a GPU"),
    ]
    assert check.table(facts, outcomes) == (
        "date: 2026-01-01; GPU, driver, memory: NVIDIA H200, 580.65, 143771 MiB\n\n"
        "| step | status | seconds |\n|---|---|---:|\n"
        "| grouped GEMM | passed | 12.5 |\n| kernels, all | skipped: needs a GPU | 0 |\n\n"
        "| step | what | value |\n|---|---|---:|\n| grouped GEMM | speed | 3.5 TFLOP/s |\n"
    )


def test_the_limits_fit_fifteen_minutes() -> None:
    """And what a step runs is there."""
    assert sum(step.limit_s for step in STEPS) <= 15 * 60
    root = Path(check.__file__).parents[2]
    for step in STEPS:
        for part in step.command:
            if part.endswith(".py"):
                assert (root / part).is_file(), part


def test_an_unknown_step_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--only", "everything"])
    assert "no step is called everything" in capsys.readouterr().err


def test_how_a_trace_is_read() -> None:
    from scripts.gpu import trace_layer

    kernels = [(0.0, 10.0, "gemm"), (5.0, 12.0, "nccl"), (12.0, 13.0, "Memcpy DtoH"), (33.0, 40.0, "permute")]
    assert trace_layer.busy_us(kernels) == 20
    assert trace_layer.gap_after_counts_us(kernels) == 20
    assert trace_layer.gap_after_counts_us(kernels[:2]) == 0
