"""Regret account of a run: how much of the force-balanced ideal it reached, and where the rest of its step went.

The ideal is measured: a second run of the same launch with `--moe-router-force-load-balancing`, whose routers choose
at random and therefore evenly. What the run's step takes longer is explained term by term. A term is either measured (a
part of the step that was timed by itself) or modelled (a difference of counts times a constant that was fitted to the
run, `cost.fitted`); none is what the others leave over, and what they leave over is shown as unexplained.

What a step takes is what the busiest rank takes. Where clocks do not count waiting (`cpu`), it is the rank with the
most seconds, and the terms are that rank's counts against those of the ideal's busiest rank on the same pipeline stage.
Where they do (`gpu`), all ranks of a layer wait for the busiest, so the counts are those of the busiest rank of each
layer and micro-batch, added up on the stage that has the most.

The ideal has a residual imbalance of its own, since random choices are even only on average: counts are compared with
its counts, not with a perfect balance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_smartmoe.cost.fitted import Basis, Count, FittedStep, Part, StepRecord, fit_step
from megatron_smartmoe.cost.step.pipeline import schedule_s
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray, IntArray

PARTS = {
    Part.OUTSIDE: "outside the MoE layers",
    Part.DISPATCH: "router, permutation, all-to-all",
    Part.EXPERTS: "experts",
    Part.REPLICAS: "replica traffic",
    Part.PLANNING: "planning",
    Part.MIGRATION: "migration",
}

_OF_A_RANK = [Count.TOKENS, Count.GROUPS, Count.CALLS, Count.PORT_TOKENS]
_OF_THE_BUSIEST = [Count.BUSIEST_TOKENS, Count.BUSIEST_GROUPS, Count.CALLS, Count.BUSIEST_PORT_TOKENS]

MACHINE = "machine"
_SPEED = "the machine's speed, from one run to the other"

Kind = Literal["measured", "modelled"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """Seconds of a step that the ideal does not have; negative where it has more.

    Attributes:
        name: for programs.
        label: for people.
        seconds: of an iteration, mean.
        kind: how it is known.
    """

    name: str
    label: str
    seconds: float
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where the time of a run's steps went; see the module.

    Attributes:
        basis: what the seconds are; see `StepRecord`.
        iterations: how many were counted.
        step_s: of the busiest rank, mean over the iterations.
        split_s: its parts, which add up to it.
        ideal_s: of a step of the force-balanced run; None where none was measured.
        ideal_split_s: its parts; empty where none was measured.
        terms: what the run's step has and the ideal's does not; without an ideal, against the mean rank of the run.
        fitted: the constants behind the modelled terms.
    """

    basis: Basis
    iterations: int
    step_s: float
    split_s: tuple[float, ...]
    ideal_s: float | None
    ideal_split_s: tuple[float, ...]
    terms: tuple[Term, ...]
    fitted: FittedStep

    @property
    def share(self) -> float | None:
        """The ideal's step, at the speed that the machine had in the run, over the run's; None without an ideal."""
        if self.ideal_s is None:
            return None
        return (self.ideal_s + sum(term.seconds for term in self.terms if term.name == MACHINE)) / self.step_s

    @property
    def unexplained_s(self) -> float | None:
        """What the terms leave over between the ideal and the run; None where no ideal was measured."""
        return None if self.ideal_s is None else self.step_s - self.ideal_s - sum(term.seconds for term in self.terms)

    def to_json(self) -> dict[str, Any]:
        """For `summary.json`. Shares are of the run's step; with an ideal they add up to 1, the machine's speed apart,
        which is part of the ideal's."""
        unexplained_s = self.unexplained_s
        return {
            "basis": self.basis,
            "iterations": self.iterations,
            "step_s": self.step_s,
            "split_s": {part.name.lower(): self.split_s[part] for part in Part},
            "ideal_s": self.ideal_s,
            "share_of_ideal": self.share,
            "terms": {
                term.name: {
                    "label": term.label,
                    "seconds": term.seconds,
                    "share": term.seconds / self.step_s,
                    "kind": term.kind,
                }
                for term in self.terms
            },
            "unexplained_s": unexplained_s,
            "unexplained_share": None if unexplained_s is None else unexplained_s / self.step_s,
            "fitted": {
                name: value for name, value in vars(self.fitted).items() if name not in ("residuals", "outside_s")
            }
            | {"outside_s": list(self.fitted.outside_s), "residual_spread": self.fitted.spread},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Busiest:
    """What each step waited for: its seconds, their parts, the counts behind them, and the stage they are of."""

    step_N: FloatArray
    parts_NP: FloatArray
    counts_NC: FloatArray
    stage_N: IntArray
    weight_N: IntArray

    def mean(self, values_N: FloatArray) -> Any:
        return np.average(values_N, axis=0, weights=self.weight_N)


def account_of(record: StepRecord, ideal: StepRecord | None = None, *, fitted: FittedStep | None = None) -> Account:
    """Account for a run's steps.

    Args:
        record: of the run.
        ideal: of its force-balanced twin. Of both the first iterations are left out where there are enough others.
        fitted: constants that were fitted to more of the run than `record`, all of which then counts; None fits them.

    Raises:
        PlanError: the two do not fit together, or one has no iterations.
    """
    record = record if fitted is not None else record.without_warm_up()
    if ideal is not None:
        ideal = ideal.without_warm_up()
        _check_twins(record, ideal)
    # Step 1: what was measured, and constants fitted to it. The machine may have been slower in one of the two runs:
    # what is the same work in both says by how much.
    speed = 1.0 if ideal is None else _speed(record, ideal)
    fitted = fitted or fit_step(record, [(ideal, speed)] if ideal is not None else [])
    busiest = _busiest(record)
    step_s = float(busiest.mean(busiest.step_N))
    # Step 2: the terms, against the ideal or, without one, against the mean rank.
    terms, ideal_s, ideal_split_s = [], None, tuple[float, ...]()
    if ideal is None:
        terms = _terms(busiest, fitted, _mean_rank(record, busiest), np.zeros(len(Part)))
    else:
        twin = _busiest(ideal)
        ideal_s, ideal_parts_P = float(twin.mean(twin.step_N)), twin.mean(twin.parts_NP)
        ideal_split_s = tuple(ideal_parts_P.tolist())
        terms = [
            Term(name=MACHINE, label=_SPEED, seconds=(speed - 1) * ideal_s, kind="measured"),
            *_stages(record, ideal, busiest, fitted, speed, ideal_s),
            *_terms(busiest, fitted, _same_stages(ideal, busiest), ideal_parts_P * speed),
        ]
    return Account(
        basis=record.basis,
        iterations=int(record.iterations_N.sum()),
        step_s=step_s,
        split_s=tuple(busiest.mean(busiest.parts_NP).tolist()),
        ideal_s=ideal_s,
        ideal_split_s=ideal_split_s,
        terms=tuple(terms),
        fitted=fitted,
    )


def _check_twins(record: StepRecord, ideal: StepRecord) -> None:
    if record.basis != ideal.basis:
        raise PlanError(f"the ideal was timed on {ideal.basis}, the run on {record.basis}: run both on one machine")
    if record.stage_R.tolist() != ideal.stage_R.tolist():
        raise PlanError(
            f"the ideal has {len(ideal.stage_R)} ranks on {ideal.stage_R.max() + 1} pipeline stages, the run "
            f"{len(record.stage_R)} on {record.stage_R.max() + 1}: launch both alike"
        )
    if record.micro_batches != ideal.micro_batches:
        raise PlanError(
            f"the ideal has {ideal.micro_batches} micro-batches, the run {record.micro_batches}: launch both alike"
        )


def _speed(record: StepRecord, ideal: StepRecord) -> float:
    """How much longer the machine took in the run for the same work, that outside the MoE layers of all ranks."""
    if record.basis != "cpu":  # there that part has waiting in it
        return 1.0
    run_s, ideal_s = (one.mean(one.seconds_NRP[:, :, Part.OUTSIDE]).sum() for one in (record, ideal))
    return float(run_s / ideal_s)


def _busiest(record: StepRecord, stage: int | None = None) -> _Busiest:
    """What the steps waited for; of one stage, or of all."""
    ranks = np.nonzero((record.stage_R == stage) if stage is not None else record.stage_R >= 0)[0]
    if record.basis == "cpu":
        rank_N = ranks[record.step_NR[:, ranks].argmax(axis=1)]
        columns = _OF_A_RANK
    else:
        rank_N = ranks[record.counts_NRC[:, ranks, Count.BUSIEST_TOKENS].argmax(axis=1)]
        columns = _OF_THE_BUSIEST
    row_N = np.arange(len(rank_N))
    return _Busiest(
        step_N=record.step_NR[row_N, rank_N],
        parts_NP=record.seconds_NRP[row_N, rank_N],
        counts_NC=record.counts_NRC[row_N, rank_N][:, columns],
        stage_N=record.stage_R[rank_N],
        weight_N=record.iterations_N,
    )


def _mean_rank(record: StepRecord, busiest: _Busiest) -> FloatArray:
    """Counts of the mean rank of the stages that the steps waited for, `[C]`."""
    by_stage_SNC = np.stack(
        [record.counts_NRC[:, record.stage_R == stage].mean(axis=1)[:, _OF_A_RANK] for stage in _stage_numbers(record)]
    )
    return np.asarray(busiest.mean(by_stage_SNC[busiest.stage_N, np.arange(len(busiest.stage_N))]))


def _stage_numbers(record: StepRecord) -> range:
    return range(int(record.stage_R.max()) + 1)


def _same_stages(ideal: StepRecord, busiest: _Busiest) -> FloatArray:
    """Counts of the ideal's busiest rank on the stages that the run's steps waited for, `[C]`."""
    counts_SC = np.stack([(one := _busiest(ideal, stage)).mean(one.counts_NC) for stage in _stage_numbers(ideal)])
    return np.asarray(busiest.mean(counts_SC[busiest.stage_N]))


def _stages(
    record: StepRecord, ideal: StepRecord, busiest: _Busiest, fitted: FittedStep, speed: float, ideal_s: float
) -> list[Term]:
    """The pipeline's term, where there are stages."""
    stages = _stage_numbers(record)
    if len(stages) == 1:
        return []
    label = "pipeline bubble by stage imbalance"
    if record.basis == "cpu":  # no clock counts a bubble: what is left of stages is which one has the busiest rank
        step_S = np.array([(one := _busiest(ideal, stage)).mean(one.step_N) for stage in stages])
        seconds = float(speed * (busiest.mean(step_S[busiest.stage_N]) - ideal_s))
        return [Term(name="pipeline", label=label, seconds=seconds, kind="measured")]
    bubbles = []
    for each in (record, ideal):
        layers_s = [_moe_s(_busiest(each, stage), fitted) / each.micro_batches for stage in stages]
        bubbles.append(schedule_s(layers_s, each.micro_batches, each.virtual)[1])
    return [Term(name="pipeline", label=label, seconds=bubbles[0] - bubbles[1], kind="modelled")]


def _moe_s(busiest: _Busiest, fitted: FittedStep) -> float:
    """Modelled seconds of a stage's MoE layers in an iteration."""
    return float(busiest.mean(busiest.counts_NC) @ _constants(fitted))


def _constants(fitted: FittedStep) -> FloatArray:
    return np.array([fitted.token_s, fitted.group_s, fitted.call_s, fitted.port_token_s])


def _terms(busiest: _Busiest, fitted: FittedStep, counts_C: FloatArray, parts_P: FloatArray) -> list[Term]:
    """The terms of the MoE layers: counts against `counts_C`, measured parts against `parts_P`."""
    tokens_s, groups_s, calls_s, port_s = (busiest.mean(busiest.counts_NC) - counts_C) * _constants(fitted)
    more_P = busiest.mean(busiest.parts_NP) - parts_P
    modelled: Sequence[tuple[str, str, float]] = (
        ("imbalance", "residual imbalance", tokens_s),
        ("shapes", "expert shapes (uneven groups)", groups_s),
        ("all_to_all", "all-to-all by the busiest link", calls_s + port_s),
    )
    measured: Sequence[tuple[str, str, float]] = (
        ("replicas", "replica traffic (exposed)", more_P[Part.REPLICAS]),
        ("migration", "migration", more_P[Part.MIGRATION]),
        ("planning", "planning", more_P[Part.PLANNING]),
    )
    return [
        *(Term(name=name, label=label, seconds=float(s), kind="modelled") for name, label, s in modelled),
        *(Term(name=name, label=label, seconds=float(s), kind="measured") for name, label, s in measured),
    ]
