"""The account of a run directory: account.jsonl read back, with the ideal of another run where one is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smartmoe.cost.account import PARTS, Account, account_of
from megatron_smartmoe.cost.fitted import Count, Part, StepRecord
from megatron_smartmoe.cost.memory.budget import LABELS
from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.report.binning import MOST_BINS
from megatron_smartmoe.report.run_record import read_lines
from megatron_smartmoe.spec.arrays import FloatArray

FILE = "account.jsonl"
_VERSION = 1
_WAY_OUT = "Take account.jsonl away to do without the account, or restore it."
CLOCKS = {"cpu": "CPU time of the busiest rank's thread", "gpu": "time of the device's stream"}


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSteps:
    """What a run has measured of its steps.

    Attributes:
        record: times and counts.
        intervals: the other figures of each log interval, by its last iteration.
    """

    record: StepRecord
    intervals: dict[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunAccount:
    """A run's measurements and what they amount to."""

    steps: MeasuredSteps
    account: Account

    @property
    def latest(self) -> dict[str, Any]:
        """The other figures of the last log interval; empty before the first one."""
        intervals = self.steps.intervals
        return intervals[max(intervals)] if intervals else {}


def read_steps(directory: Path) -> MeasuredSteps | None:
    """Read a run's account.jsonl; None where it has none, or no iteration yet.

    A resumed run writes its header again: what follows the last one is what is read, since a launch may have changed.

    Raises:
        ConfigError: it is damaged, or of a later version.
    """
    path = directory / FILE
    header: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        if "version" in line:
            if line["version"] != _VERSION:
                rule = f"is not version {_VERSION}, which this release reads"
                raise ConfigError(f"{path}: version", line["version"], rule, "Read it with the release that wrote it.")
            header, rows = line, {}
        elif header:
            rows[int(line.get("iteration", 0))] = line
    if not rows:
        return None
    lines = [rows[iteration] for iteration in sorted(rows)]
    try:
        record = StepRecord(
            basis=header["basis"],
            iteration_N=np.array(sorted(rows)),
            iterations_N=np.array([line["iterations"] for line in lines]),
            seconds_NRP=np.array([line["seconds"] for line in lines], dtype=np.float64),
            counts_NRC=np.array([line["counts"] for line in lines], dtype=np.float64),
            stage_R=np.array(header["stages"]),
            micro_batches=int(header["micro_batches"]),
            virtual=int(header["virtual"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(str(path), str(error), "is no account of steps", _WAY_OUT) from None
    expected = (len(lines), len(record.stage_R))
    if record.seconds_NRP.shape != (*expected, len(Part)) or record.counts_NRC.shape != (*expected, len(Count)):
        raise ConfigError(str(path), list(record.seconds_NRP.shape), "has rows of other ranks or columns", _WAY_OUT)
    return MeasuredSteps(
        record=record, intervals={at: line for at, line in rows.items() if "tokens_per_second" in line}
    )


def read_account(directory: Path, ideal: Path | None = None) -> RunAccount | None:
    """The account of a run; None where it has measured nothing.

    Args:
        directory: of the run.
        ideal: run directory of its force-balanced twin.

    Raises:
        ConfigError: a file is damaged; or the ideal has no account, or is of another launch.
    """
    steps, twin = read_steps(directory), None
    if steps is None:
        if ideal is not None:
            way_out = "Run with --smartmoe-account on, or leave --ideal away."
            raise ConfigError("RUN", str(directory), f"has no {FILE} to compare with the ideal", way_out)
        return None
    if ideal is not None:
        found = read_steps(ideal)
        if found is None:
            way_out = "Run the same launch with --moe-router-force-load-balancing and --smartmoe-account on."
            raise ConfigError("--ideal", str(ideal), f"has no {FILE}", way_out)
        twin = found.record
    try:
        return RunAccount(steps=steps, account=account_of(steps.record, twin))
    except PlanError as error:
        raise ConfigError("--ideal", str(ideal), str(error), "Name the force-balanced run of this launch.") from None


def table(account: Account) -> list[tuple[str, str, str, str]]:
    """Rows of the account: what, milliseconds, share of the step, how it is known."""

    def row(label: str, seconds: float, kind: str) -> tuple[str, str, str, str]:
        ms, share = round(seconds * 1e3, 2) + 0.0, round(seconds / account.step_s, 3) + 0.0  # no -0.00
        return label, f"{ms:.2f}", f"{share:.1%}", kind

    rows = []
    if account.ideal_s is not None:
        rows.append(row("force-balanced ideal", account.ideal_s, "measured, the other run"))
    rows += [row(term.label, term.seconds, term.kind) for term in account.terms]
    if account.unexplained_s is not None:
        rows += [row("unexplained", account.unexplained_s, "what the terms leave over")]
        rows += [row("step", account.step_s, "measured")]
    return rows


def split(account: Account) -> list[tuple[str, str, str, str]]:
    """Rows of the step's parts: what, milliseconds, share of the step, milliseconds of the ideal."""
    return [
        (
            label,
            f"{account.split_s[part] * 1e3:.2f}",
            f"{account.split_s[part] / account.step_s:.1%}",
            f"{account.ideal_split_s[part] * 1e3:.2f}" if account.ideal_split_s else "",
        )
        for part, label in PARTS.items()
    ]


def memory(found: RunAccount) -> list[tuple[str, str]]:
    """Rows of memory: the hottest rank's peak, its limit, and the planner's parts at the run's imbalance."""
    last = found.latest.get("memory")
    if last is None:
        return []

    def gib(num_bytes: float) -> str:
        return f"{num_bytes / 2**30:.3f}"

    plan = last["planned_bytes"] or {}
    return [
        (f"peak, measured (rank {last['rank']}, the fullest)", gib(last["peak_bytes"])),
        ("limit of that rank", gib(last["limit_bytes"])),
        *([("planned, at the measured imbalance", gib(sum(plan.values())))] if plan else []),
        *((f"planned: {label}", gib(plan[label])) for label in LABELS.values() if label in plan),
    ]


def parts_over_time(found: RunAccount) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Iterations, and milliseconds of each part of the busiest rank's step in them.

    A long run is cut into MOST_BINS stretches; the longest step of each stands for it.
    """
    record = found.steps.record
    longest_N = record.step_NR.max(axis=1)
    bins = np.array_split(np.arange(len(longest_N)), min(MOST_BINS, len(longest_N)))
    row_B = np.array([each[longest_N[each].argmax()] for each in bins])
    parts_BP = record.seconds_NRP[row_B, record.step_NR[row_B].argmax(axis=1)] * 1e3
    shown = {label: parts_BP[:, part] for part, label in PARTS.items() if parts_BP[:, part].any()}
    return record.iteration_N[row_B].astype(np.float64), shown


def summary_text(account: Account) -> str:
    """The account as a table of text, for the terminal."""
    rows = table(account)
    width = max(len(label) for label, *_ in rows)
    head = f"step {account.step_s * 1e3:.1f} ms, {CLOCKS[account.basis]}, mean of {account.iterations} iterations"
    if account.share is not None:
        head += f"; {account.share:.1%} of the force-balanced ideal reached"
    return "\n".join([head, *(f"  {label:{width}}  {ms:>9} ms  {share:>6}  {kind}" for label, ms, share, kind in rows)])
