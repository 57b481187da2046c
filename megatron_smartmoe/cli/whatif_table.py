"""What `smartmoe whatif` prints and writes: a table for people, an object for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_smartmoe.report.fit import Fitted
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.parallel import ParallelSpec

_HEAD = (
    "        EP slots replicas homes micro   step ms   bar of run max/mean memory exchange replicas moves",
    "                          every batch                          tokens    GiB      MiB      MiB   MiB",
)
WIDE = 0.15  # a bar that is wider says that the run tells too little about a setting
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A setting as predicted.

    Attributes:
        spec: the launch.
        cluster: its machine.
        step_s: seconds of a step, the median over iterations.
        bar: to either side, relative; nine of ten errors are smaller.
        terms_s: seconds of the busiest rank by group of terms, mean over iterations.
        imbalance: max / mean tokens per rank, mean over layers and iterations.
        memory_bytes: of the fullest rank.
        exchange_bytes: of a step's all-to-alls, the busiest rank's.
        replica_bytes: of a step's replicas, weights out and gradients back, the busiest rank's.
        migration_bytes: of experts that move home, all ranks, per step.
        experts_moved: homes that moved in the iterations that count.
    """

    spec: ParallelSpec
    cluster: ClusterSpec
    step_s: float
    bar: float
    terms_s: dict[str, float]
    imbalance: float
    memory_bytes: float
    exchange_bytes: float
    replica_bytes: float
    migration_bytes: float
    experts_moved: int


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What the predictions rest on.

    Attributes:
        run: its name.
        measured_s: seconds of its steps, the median.
        measurements: steps, or lines of its log, that were fitted.
        by_rank: whether a step is the busiest rank's CPU time; else it is wall time.
        fitted: factors of the cost model's terms.
        groups: names of the factors.
        iterations: first and last that count.
        left_out: setting that cannot be -> the reason.
        notes: what the predictions leave out.
    """

    run: str
    measured_s: float
    measurements: int
    by_rank: bool
    fitted: Fitted
    groups: Sequence[str]
    iterations: tuple[int, int]
    left_out: Mapping[str, str]
    notes: Sequence[str]


def label(spec: ParallelSpec) -> str:
    """A setting in a few words."""
    slots = f"{spec.spare_slots} spare slot{'' if spec.spare_slots == 1 else 's'}"
    parts = [f"EP {spec.ep}", f"{slots} {spec.replicas}" if spec.spare_slots else "no replicas"]
    parts.append(f"homes every {spec.homes_interval}" if spec.homes_interval else "fixed homes")
    return ", ".join([*parts, f"micro-batch {spec.micro_batch}"])


def in_order(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The run itself, then the others, machine by machine, the fastest first."""
    places = [_place(one) for one in predictions]
    return [predictions[0], *sorted(predictions[1:], key=lambda one: (places.index(_place(one)), one.step_s))]


def as_table(predictions: Sequence[Prediction], basis: Basis) -> str:
    """A line per setting; the first is the run."""
    run, *others = in_order(predictions)
    lines = [_headline(basis, run), *_HEAD, _row("run", run, run)]
    place = _place(run)
    for number, one in enumerate(others, 1):
        if (where := _place(one)) != place:
            lines.append(f"on {where}:")
            place = where
        lines.append(_row(str(number), one, run))
    lines += ["", *_ground(basis, run)]
    if any(one.bar > WIDE for one in others):
        lines.append(f"A bar above {WIDE:.0%} means that this run tells too little about the setting.")
    for reason, number in Counter(basis.left_out.values()).items():
        lines.append(f"Left out, {number} setting{'' if number == 1 else 's'}: {reason}.")
    return "\n".join([*lines, *(f"Note: {note}." for note in basis.notes)])


def _headline(basis: Basis, run: Prediction) -> str:
    first, last = basis.iterations
    what = "CPU time of the busiest rank" if basis.by_rank else "wall time"
    return f"{basis.run}, on {_place(run)}: predicted steps ({what}), routed as iterations {first} to {last}"


def _place(one: Prediction) -> str:
    return f"{one.spec.gpus} x {one.cluster.gpu.name} ({one.cluster.name})"


def _row(name: str, one: Prediction, run: Prediction) -> str:
    spec = one.spec
    text = f"{name:<5} {spec.ep:>4} {spec.spare_slots:>5} {spec.replicas:<8} {spec.homes_interval or '-':>5} "
    text += f"{spec.micro_batch:>5} {one.step_s * 1e3:9.1f} {f'±{one.bar:.0%}':>5} {one.step_s / run.step_s:6.1%} "
    text += f"{one.imbalance:8.3f} {one.memory_bytes / _GIB:6.2f} {one.exchange_bytes / _MIB:8.1f} "
    return text + f"{one.replica_bytes / _MIB:8.1f} {one.migration_bytes / _MIB:5.1f}"


def _ground(basis: Basis, run: Prediction) -> list[str]:
    kind = "steps of each rank" if basis.by_rank else "step times of the log"
    error = run.step_s / basis.measured_s - 1
    return [
        f"Measured: {basis.measured_s * 1e3:.1f} ms (median); predicted for it: {error:+.1%}. Fitted to "
        f"{basis.measurements} {kind}, {basis.fitted.noise:.1%} off each.",
        "Bar: nine of ten errors are smaller, judged by the run's own. Exchange and replicas: the busiest rank's bytes",
        "of a step; moves: those of all ranks.",
    ]


def as_json(predictions: Sequence[Prediction], basis: Basis) -> dict[str, Any]:
    """The table's numbers, and what they rest on."""
    fitted = basis.fitted
    deviation_G = np.sqrt(np.diag(fitted.covariance_GG))
    return {
        "run": basis.run,
        "measured": {
            "step_s": basis.measured_s,
            "measurements": basis.measurements,
            "what": "cpu_s_of_busiest_rank" if basis.by_rank else "wall_s",
        },
        "iterations": list(basis.iterations),
        "fit": {
            "noise": fitted.noise,
            "factors": {
                name: {"value": float(value), "deviation": float(deviation)}
                for name, value, deviation in zip(basis.groups, fitted.factors_G, deviation_G, strict=True)
            },
        },
        "settings": [_numbers(one, is_run=at == 0) for at, one in enumerate(predictions)],
        "left_out": dict(basis.left_out),
        "notes": list(basis.notes),
    }


def _numbers(one: Prediction, *, is_run: bool) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(one).items() if name not in ("spec", "cluster")}
    names = {"label": label(one.spec), "is_run": is_run, "cluster": one.cluster.name}
    return {**names, "launch": one.spec.to_json(), **numbers}
