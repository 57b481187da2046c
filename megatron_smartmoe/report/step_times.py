"""Measured steps of a run: what its account has of each rank, wall time from its log, or a file of CPU times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.report.account import FILE, read_steps
from megatron_smartmoe.report.run_record import RunRecord
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from megatron_smartmoe.spec.parallel import ParallelSpec
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
        parts_MUP: seconds of the step's parts, in the order of `Part`; None where whole steps were measured.
        note: why it is not what one would expect; empty where it is.
    """

    first_M: IntArray
    last_M: IntArray
    seconds_MU: FloatArray
    by_rank: bool
    parts_MUP: FloatArray | None = None
    note: str = ""


def step_times(record: RunRecord, directory: Path, path: Path | None, spec: ParallelSpec) -> StepTimes:
    """The measured steps of a run: of the file, else of its account, else of its log.

    Args:
        record: of the run directory.
        directory: the run directory.
        path: CSV file with the columns `iteration,rank,seconds`; None for what the run measured itself.
        spec: the launch.

    Raises:
        ConfigError: there are too few of them, or a file is damaged or lacks a rank, or is of a launch whose ranks do
            not have all layers each.
    """
    divided = _divided(spec)
    if path is not None and divided:
        rule = f"is for runs in which every rank has all layers, and this one has {divided}"
        raise ConfigError("--step-times", str(path), rule, "Remove it: wall time is fitted then.")
    found = _of_file(path, spec.gpus) if path is not None else _of_account(directory, divided) or _of_log(record)
    if path is None and divided and not found.by_rank and (directory / FILE).is_file():
        why = f"CPU time of ranks says nothing about waiting for each other, and the run has {divided}"
        found = replace(found, note=f"fitted to wall time: {why}")
    if len(found.last_M) < LEAST:
        field = "RUN" if path is None else "--step-times"
        rule = f"has {len(found.last_M)} measured steps: must be at least {LEAST}"
        way_out = "Train longer, or with a smaller --log-interval."
        raise ConfigError(field, record.name if path is None else str(path), rule, way_out)
    return found


def _divided(spec: ParallelSpec) -> str:
    """What divides layers among the ranks, so that a rank's CPU time is not a step's; empty where nothing does."""
    sizes = (("pipeline", spec.pp), ("tensor", spec.tp), ("expert-tensor", spec.etp), ("context", spec.cp))
    return next((f"{name} parallel size {size}" for name, size in sizes if size > 1), "")


def _of_account(directory: Path, divided: str) -> StepTimes | None:
    """Each rank's CPU time, with its parts; of GPUs the slowest rank's time; None where the run has no account."""
    steps = read_steps(directory)
    if steps is None or (steps.record.basis == "cpu" and divided):
        return None
    measured = steps.record.without_warm_up()
    first_M = measured.iteration_N - measured.iterations_N + 1
    seconds_MU = measured.step_NR
    if measured.basis == "cpu":
        return StepTimes(
            first_M=first_M,
            last_M=measured.iteration_N,
            seconds_MU=seconds_MU,
            by_rank=True,
            parts_MUP=measured.seconds_NRP,
        )
    longest_MU = seconds_MU.max(axis=1, keepdims=True)
    return StepTimes(first_M=first_M, last_M=measured.iteration_N, seconds_MU=longest_MU, by_rank=False)


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
