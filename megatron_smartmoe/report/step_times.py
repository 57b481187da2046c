"""Measured steps of a run: wall time from its log, or each rank's CPU time from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.report.run_record import RunRecord
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.readers.csv_rows import read_rows
from megatron_smartmoe.spec.readers.files import Named

LEAST = 4  # measurements, fewer of which say nothing about how far off one is


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Measured seconds.

    Attributes:
        first_M: first iteration of each measurement, `[M]`; a log line is the mean of several iterations.
        last_M: last iteration of each.
        seconds_MU: of a step; U is 1 for wall time, and the number of ranks for each rank's CPU time.
        by_rank: whether it is each rank's CPU time.
    """

    first_M: IntArray
    last_M: IntArray
    seconds_MU: FloatArray
    by_rank: bool


def step_times(record: RunRecord, path: Path | None, num_ranks: int) -> StepTimes:
    """The measured steps of a run.

    Args:
        record: of the run directory.
        path: CSV file with the columns `iteration,rank,seconds`; None for the step times in the run's log.
        num_ranks: of the run.

    Raises:
        ConfigError: there are too few of them, or the file is damaged or lacks a rank.
    """
    found = _of_log(record) if path is None else _of_file(path, num_ranks)
    if len(found.last_M) < LEAST:
        field = "RUN" if path is None else "--step-times"
        rule = f"has {len(found.last_M)} measured steps: must be at least {LEAST}"
        way_out = "Train longer, or with a smaller --log-interval."
        raise ConfigError(field, record.name if path is None else str(path), rule, way_out)
    return found


def _of_log(record: RunRecord) -> StepTimes:
    series = record.metrics.get("seconds_per_step")
    last = np.zeros(0) if series is None else series.iteration
    values = np.zeros(0) if series is None else series.value
    logged = record.metrics.get("lm loss")
    before = sorted({0.0, *(logged.iteration.tolist() if logged is not None else []), *last.tolist()})
    first = [before[before.index(at) - 1] + 1 for at in last.tolist()]  # after the line before, with times or without
    return StepTimes(
        first_M=np.array(first, dtype=np.int64),
        last_M=last.astype(np.int64),
        seconds_MU=values[:, None],
        by_rank=False,
    )


def _of_file(path: Path, num_ranks: int) -> StepTimes:
    named = Named(path=path, field="--step-times", way_out="Give a CSV file with the columns iteration,rank,seconds.")
    found: dict[int, dict[int, float]] = {}
    for row in read_rows(named, ("iteration", "rank", "seconds")):
        rank = row.whole("rank", most=num_ranks - 1)
        found.setdefault(row.whole("iteration"), {})[rank] = row.number("seconds")
    for iteration, by_rank in found.items():
        if len(by_rank) < num_ranks:
            missing = next(rank for rank in range(num_ranks) if rank not in by_rank)
            rule = f"lacks rank {missing} of iteration {iteration}"
            raise ConfigError("--step-times", str(path), rule, f"Every iteration needs all {num_ranks} ranks.")
    iterations = np.array(sorted(found), dtype=np.int64)
    seconds = [[found[int(iteration)][rank] for rank in range(num_ranks)] for iteration in iterations]
    return StepTimes(
        first_M=iterations, last_M=iterations, seconds_MU=np.array(seconds).reshape(-1, num_ranks), by_rank=True
    )
