"""Splits of measured runs into those that are fitted and those that are asked for, and how good the answers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.validation.fit import FitSetting, Fitted, Machines, fit, fit_settings
from scripts.validation.measured import MeasuredRun

LEFT_OUT: dict[str, Callable[[MeasuredRun], object]] = {
    "capacity": lambda run: run.capacity,
    "system": lambda run: run.system,
    "strategy": lambda run: (run.parts[0].spec.pp, run.parts[0].spec.ep),
}
HEADER = f"{'':42} {'runs':>5} {'median error':>13} {'worst error':>12} {'settings':>9} {'worst regret':>13}"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Runs and what was predicted for them.

    Attributes:
        runs: the runs.
        predicted_s: seconds of a step, one per run.
    """

    runs: tuple[MeasuredRun, ...]
    predicted_s: tuple[float, ...]

    @classmethod
    def of(cls, model: Fitted, runs: Sequence[MeasuredRun]) -> Answers:
        """What a model says of the runs."""
        return cls(runs=tuple(runs), predicted_s=tuple(model.predict(run).total_s for run in runs))

    def __add__(self, other: Answers) -> Answers:
        """Both."""
        return Answers(runs=self.runs + other.runs, predicted_s=self.predicted_s + other.predicted_s)

    @property
    def errors(self) -> list[float]:
        """Predicted over measured, less one."""
        return [at / run.time_s - 1 for at, run in zip(self.predicted_s, self.runs, strict=True)]

    @property
    def settings(self) -> list[FitSetting]:
        """The settings whose runs compete."""
        return fit_settings(self.runs, self.predicted_s)

    def summary(self) -> dict[str, float]:
        """Median and worst error, and the most that a first choice costs; fractions."""
        errors = np.abs(self.errors)
        return {
            "median_ape": float(np.median(errors)),
            "worst_ape": float(errors.max()),
            "worst_regret": max(setting.regret for setting in self.settings),
            "rows": len(self.runs),
        }

    def line(self, what: str) -> str:
        """The summary under `HEADER`."""
        found, competing = self.summary(), sum(setting.runs > 1 for setting in self.settings)
        return (
            f"{what:42} {found['rows']:5} {found['median_ape']:13.2%} {found['worst_ape']:12.1%} {competing:9} "
            f"{found['worst_regret']:13.1%}"
        )


def held_out(runs: Sequence[MeasuredRun], clusters: Mapping[str, Machines]) -> Iterator[tuple[str, Answers]]:
    """(what was held back, the answers for it): each capacity, system and strategy in turn, then the larger jobs."""
    for name, of in LEFT_OUT.items():
        values = list(dict.fromkeys(map(of, runs)))
        if len(values) < 2:
            continue
        answers = Answers(runs=(), predicted_s=())
        for value in values:
            model = fit([run for run in runs if of(run) != value], clusters)
            answers += Answers.of(model, [run for run in runs if of(run) == value])
        yield f"one {name} left out", answers
    fewest = min(run.gpus for run in runs)
    larger = [run for run in runs if run.gpus > fewest]
    if larger:
        model = fit([run for run in runs if run.gpus == fewest], clusters)
        yield f"from {fewest} GPUs to more", Answers.of(model, larger)
