"""The controller without Megatron, on gloo ranks: decisions, failures, and ranks that decide differently."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.runtime.controller import Controller, ControllerOptions, Moved
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

HOT = [90, 90, 1, 1, 10, 10, 10, 10]  # tokens of each expert and micro-batch: experts 0 and 1 are hot, both on rank 0


class RecordingReporter:
    """Keeps what the controller reports."""

    def __init__(self) -> None:
        self.decisions: list[tuple[Decision, float, float, Moved | None]] = []
        self.warnings: list[str] = []

    def decided(self, decision: Decision, before: float, after: float, moved: Moved | None) -> None:
        self.decisions.append((decision, before, after, moved))

    def warn(self, iteration: int, text: str) -> None:
        self.warnings.append(text)


class FakeMover:
    """Moves nothing, and returns success or the given failure."""

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure
        self.calls = 0

    def move(self, before: Placement, after: Placement) -> Moved:
        self.calls += 1
        return Moved(placement=before if self.failure else after, wire_bytes=7, failure=self.failure)


def busiest(slots_RS: IntArray, counts_RE: IntArray) -> float:
    """Seconds of a layer: a millisecond a token of the busiest rank."""
    load_E = counts_RE.sum(axis=0)
    return float(load_E[slots_RS].sum(axis=1).max()) * 1e-3


def run(case: str, iterations: int) -> dict[str, Any]:
    """Route HOT on this rank for some iterations; returns what the controller did."""
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.runtime.counts import CountsShape, ExpertCounts, IntervalCounts

    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    seconds = busiest
    if case == "an error":
        seconds = _fails
    if case == "disagreement" and rank == 1:
        seconds = _prefers_nothing
    policy = PolicyOptions(horizon_iterations=1 if case == "does not pay" else 1000, cooldown_iterations=1)
    online = OnlineOptions(
        homes_interval=1, state_bytes=10**9, migration_bytes_s=1e9, policy=policy, review_records=2, replicas="history"
    )
    counts = ExpertCounts(1, len(HOT), "cpu")
    reporter, mover = RecordingReporter(), FakeMover("no answer" if case == "a failure" else None)
    controller = Controller(
        ControllerOptions(
            mode="dry" if case == "dry" else "on", interval=4, windows=2, last=5 if case == "stop" else None
        ),
        HomesPlanner(1, len(HOT), online, seconds),
        IntervalCounts(counts, CountsShape(rows=(0,), num_ranks=2, ep_rank=rank, windows=2)),
        mover,
        reporter,
        Placement.contiguous(num_layers=1, num_experts=len(HOT), num_ranks=2),
    )
    for iteration in range(1, iterations + 1):
        counts.local_LE[0] += torch.tensor(HOT)
        controller.step(iteration)
    return {
        "decisions": [
            (d.iteration, d.kind, d.taken, d.why.split(": ")[-1 if d.kind == "review" else 0])
            for d, *_ in reporter.decisions
        ],
        "imbalance": [(round(before, 3), round(after, 3)) for _, before, after, _ in reporter.decisions],
        "warnings": reporter.warnings,
        "moves": mover.calls,
        "homes": controller.placement.home_rank_LE[0].tolist(),
    }


def _fails(slots_RS: IntArray, counts_RE: IntArray) -> float:
    raise ZeroDivisionError("a bug in the cost model")


def _prefers_nothing(slots_RS: IntArray, counts_RE: IntArray) -> float:
    return 1.0


def on_two_ranks(case: str, tmp_path: Path, iterations: int = 10) -> dict[str, Any]:
    """The result of rank 0; rank 1 must have the same homes."""
    results = run_ranks(run, 2, case, iterations, log_dir=tmp_path)
    assert results[0]["homes"] == results[1]["homes"]
    first: dict[str, Any] = results[0]
    return first


HOME = np.repeat([0, 1], 4).tolist()


def test_a_move_that_pays_is_made_and_reviewed(tmp_path: Path) -> None:
    result = on_two_ranks("pays", tmp_path)
    assert result["decisions"] == [(5, "homes", True, "pays"), (9, "review", True, "kept")]
    before, after = result["imbalance"][0]
    assert before == pytest.approx(182 / 111, abs=1e-3)
    assert after < 1.1
    assert result["moves"] == 1
    assert result["homes"] != HOME


def test_a_move_that_does_not_pay_is_not_made(tmp_path: Path) -> None:
    result = on_two_ranks("does not pay", tmp_path)
    assert result["moves"] == 0
    assert result["homes"] == HOME


def test_a_dry_run_moves_nothing_and_re_evaluates(tmp_path: Path) -> None:
    result = on_two_ranks("dry", tmp_path)
    assert [decision[:2] for decision in result["decisions"]] == [(5, "homes"), (9, "homes")]
    assert result["moves"] == 0
    assert result["homes"] == HOME


def test_nothing_is_decided_after_the_stop(tmp_path: Path) -> None:
    assert [decision[0] for decision in on_two_ranks("stop", tmp_path)["decisions"]] == [5]


def test_an_error_in_deciding_keeps_the_placement(tmp_path: Path) -> None:
    result = on_two_ranks("an error", tmp_path)
    assert result["homes"] == HOME
    assert result["warnings"][0] == "ZeroDivisionError: a bug in the cost model"


def test_ranks_that_decide_differently_move_nothing(tmp_path: Path) -> None:
    result = on_two_ranks("disagreement", tmp_path)
    assert result["homes"] == HOME
    assert result["moves"] == 0
    assert result["warnings"][0] == "the ranks decided differently; the placement stays"


def test_a_migration_that_fails_leaves_the_homes(tmp_path: Path) -> None:
    result = on_two_ranks("a failure", tmp_path)
    assert result["homes"] == HOME
    assert result["warnings"][0] == "no answer"
