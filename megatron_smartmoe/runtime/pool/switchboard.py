"""The switchboard: keeps the setting of the pool that is in force, and judges switches by measured step times.

Method. At a re-evaluation the seconds of the MoE layers under each setting are predicted for the recent load
(`runtime.pool.prediction`); the rest of the step is what was measured minus the prediction for the setting in force.
`planner.pool.choose` switches if another setting wins more than a margin. A switch is a trial: at the next
re-evaluation the measured step is compared with the one before the switch, and if it became longer by more than noise
and a tolerance, the switch is reverted. The setting that lost is in cooldown then, for twice as long after each loss
(`placement.policy.Policy`, one for each setting).

Measurements judge, because the cost model is what proposed the switch. Whatever else changed between the two
re-evaluations, above all the load, counts for or against the switch; a wrong verdict costs one cooldown. (The homes
loop, whose moves are expensive, reviews them by the model instead: see `placement.review`.)

It uses no torch, no clock and no process group: rank 0 runs it for all ranks, and every switch can be replayed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.placement.decisions import MOST_CANDIDATES, Candidate, Decision
from megatron_smartmoe.placement.policy import Policy, PolicyOptions
from megatron_smartmoe.planner.pool import MARGIN, PoolSetting, choose

MIN_TIMED_STEPS = 5  # steps that must be timed before the verdict on a switch
NOISE_WIDTHS = 2.0  # standard errors of the difference of two medians that count as noise (95% of a normal one)
TOLERANCE = 0.02  # share of the step by which it may become longer before a switch is reverted; as large as MARGIN
_MAD_TO_SIGMA = 1.4826  # standard deviation over median absolute deviation, normal distribution: 1 / quantile(0.75)
_MEDIAN_TO_MEAN = 1.2533  # standard error of the median over that of the mean, normal distribution: sqrt(pi / 2)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured step times since the last switch.

    Attributes:
        step_s: Their median, on the slowest rank.
        noise_s: Standard error of that median.
        iterations: Number of steps that were timed.
    """

    step_s: float
    noise_s: float
    iterations: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> StepTimes:
        """From one rank's step times, at least one. Medians leave out a checkpoint that was saved in between."""
        times = np.asarray(seconds)
        median = float(np.median(times))
        spread = _MAD_TO_SIGMA * float(np.median(np.abs(times - median)))
        return cls(step_s=median, noise_s=_MEDIAN_TO_MEAN * spread / math.sqrt(len(times)), iterations=len(times))


@dataclass(frozen=True, kw_only=True)
class PoolVerdict:
    """The result of a re-evaluation.

    Attributes:
        setting: The setting in force from now on.
        before: The setting in force until now.
        reason: Keyword of the reason. A result that changes nothing is logged only if this differs from the last one.
        why: The reason in a sentence, with its numbers.
        predicted_gain_s: Predicted seconds per step that the switch saves, also in the verdict on it.
        candidates: The settings that were predicted to be the fastest, as they are logged.
        realised_gain_s: Measured seconds per step that the switch saved; None except in a verdict.
    """

    setting: PoolSetting
    before: PoolSetting
    reason: str
    why: str
    predicted_gain_s: float | None = None
    realised_gain_s: float | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def switched(self) -> bool:
        """Whether the setting in force changes."""
        return self.setting != self.before

    @property
    def is_decision(self) -> bool:
        """Whether it is a switch or the verdict on one, which are always logged."""
        return self.switched or self.realised_gain_s is not None


def pool_decision(iteration: int, verdict: PoolVerdict, inputs: str) -> Decision:
    """A switch, or the verdict on one, as it is logged.

    Args:
        iteration: the iteration that has ended.
        verdict: the result of the re-evaluation.
        inputs: digest of the counts that it was made from.
    """
    return Decision(
        iteration=iteration,
        kind="pool",
        group=-1,
        inputs=inputs,
        before=verdict.before.key,
        after=verdict.setting.key,
        taken=verdict.switched,
        why=verdict.why,
        changes=(),
        predicted_gain_s=verdict.predicted_gain_s,
        realised_gain_s=verdict.realised_gain_s,
        candidates=verdict.candidates,
    )


def evaluation_line(iteration: int, times: StepTimes, verdict: PoolVerdict) -> str:
    """A re-evaluation as a line of JSON: what was measured, and what came of it.

    Unlike a decision it is logged whether it changes anything or not: no replay can measure step times again.

    Args:
        iteration: the iteration that has ended.
        times: what it was given.
        verdict: its result.
    """
    content = {
        "iteration": iteration,
        "step_s": times.step_s,
        "noise_s": times.noise_s,
        "timed": times.iterations,
        "setting": verdict.setting.key,
        "reason": verdict.reason,
    }
    return json.dumps(content, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class SwitchboardOptions:
    """When a switch is made and when it is reverted.

    Attributes:
        margin: Share of the step that another setting must be predicted to win.
        tolerance: Share of the step by which it may become longer before the switch is reverted.
        cooldown_iterations: Cooldown of a setting, doubled by each of its reverted switches in a row.
    """

    margin: float = MARGIN
    tolerance: float = TOLERANCE
    cooldown_iterations: int = 100


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A switch that waits for its verdict."""

    before: PoolSetting
    times: StepTimes
    predicted_gain_s: float


class Switchboard:
    """Keeps the setting in force.

    Args:
        now: The setting that the run starts with.
        iteration: The last iteration before the run.
        options: Margin, tolerance and cooldown; None takes the defaults.
    """

    def __init__(self, now: PoolSetting, iteration: int, options: SwitchboardOptions | None = None) -> None:
        self.now, self.options = now, options or SwitchboardOptions()
        self._since = iteration  # the last switch, or the start
        self._trial: _Trial | None = None
        self._policies: dict[PoolSetting, Policy] = {}

    def evaluate(
        self, iteration: int, times: StepTimes, predict: Callable[[], Mapping[PoolSetting, float]]
    ) -> PoolVerdict:
        """Judge the last switch, or search for a better setting.

        Args:
            iteration: The iteration that has just ended.
            times: Step times under the setting in force.
            predict: Predicts the seconds of a step's MoE layers by setting, the one in force among them.
        """
        if self._trial is not None:
            return self._review(iteration, times, self._trial)
        seconds = step_seconds(predict(), self.now, times.step_s)
        allowed = {setting: each for setting, each in seconds.items() if not self._is_in_cooldown(setting, iteration)}
        since = iteration - self._since
        choice = choose(self.now, allowed, measured_s=times.step_s, since_switch=since, margin=self.options.margin)
        if not choice.switched:
            return self._stay(choice.reason, choice.why)
        gain_s = (1 - seconds[choice.setting] / seconds[self.now]) * times.step_s
        self._policy(choice.setting).judge(iteration, gain_s, cost_s=0.0)  # records when it was taken
        self._trial = _Trial(before=self.now, times=times, predicted_gain_s=gain_s)
        candidates = _candidates(self.now, choice.setting, allowed, times.step_s / seconds[self.now])
        verdict = self._switch(choice.setting, iteration, choice.reason, choice.why, gain_s)
        return replace(verdict, candidates=candidates)

    def _review(self, iteration: int, times: StepTimes, trial: _Trial) -> PoolVerdict:
        """Keep the setting on trial, or revert to the one before."""
        if times.iterations < MIN_TIMED_STEPS:
            timed = f"{times.iterations} step{'s' if times.iterations != 1 else ''} timed since the switch"
            return self._stay("trial", f"{timed}, {MIN_TIMED_STEPS} are needed")
        self._trial = None
        gain_s = trial.times.step_s - times.step_s
        noise_s = NOISE_WIDTHS * math.hypot(trial.times.noise_s, times.noise_s)
        beyond_s = gain_s if gain_s >= 0 else min(gain_s + noise_s, 0.0)
        policy = self._policy(self.now)
        keep = policy.realised(iteration_s=trial.times.step_s, gain_s=beyond_s).take
        why = (
            f"a step takes {times.step_s:.4g} s, before the switch {trial.times.step_s:.4g} s "
            f"(predicted {trial.predicted_gain_s:+.3g} s, measured {gain_s:+.3g} s, noise {noise_s:.2g} s)"
        )
        if keep:
            return self._stay("kept", f"kept: {why}", trial.predicted_gain_s, gain_s)
        why = f"reverted: {why}; cooldown of {self.now.key}: {policy.cooldown_iterations} iterations"
        policy.last_taken = iteration  # its cooldown starts now
        return self._switch(trial.before, iteration, "loss", why, trial.predicted_gain_s, gain_s)

    def _is_in_cooldown(self, setting: PoolSetting, iteration: int) -> bool:
        policy = self._policies.get(setting)
        if setting == self.now or policy is None or policy.last_taken is None or not policy.losses:
            return False
        return iteration - policy.last_taken < policy.cooldown_iterations

    def _policy(self, setting: PoolSetting) -> Policy:
        options = self.options
        new = Policy(PolicyOptions(cooldown_iterations=options.cooldown_iterations, tolerance=options.tolerance))
        return self._policies.setdefault(setting, new)

    def _stay(
        self, reason: str, why: str, predicted: float | None = None, realised: float | None = None
    ) -> PoolVerdict:
        return PoolVerdict(
            setting=self.now,
            before=self.now,
            reason=reason,
            why=why,
            predicted_gain_s=predicted,
            realised_gain_s=realised,
        )

    def _switch(
        self, to: PoolSetting, iteration: int, reason: str, why: str, predicted: float, realised: float | None = None
    ) -> PoolVerdict:
        before, self.now, self._since = self.now, to, iteration
        return PoolVerdict(
            setting=to, before=before, reason=reason, why=why, predicted_gain_s=predicted, realised_gain_s=realised
        )


def _candidates(
    now: PoolSetting, chosen: PoolSetting, seconds: Mapping[PoolSetting, float], scale: float
) -> tuple[Candidate, ...]:
    """The chosen setting, the next fastest ones, and the one in force, as they are logged.

    Args:
        now: the setting in force.
        chosen: the setting to switch to.
        seconds: predicted seconds of a step.
        scale: measured seconds over predicted ones, for the setting in force.
    """
    fastest = sorted(seconds, key=lambda setting: (seconds[setting], setting.key))
    others = [setting for setting in fastest if setting not in (chosen, now)][: MOST_CANDIDATES - 2]
    return tuple(
        Candidate(
            name=setting.key,
            chosen=setting == chosen,
            gain_s=(seconds[now] - seconds[setting]) * scale,
            step_s=seconds[setting] * scale,
        )
        for setting in (chosen, *others, now)
    )


def step_seconds(moe_s: Mapping[PoolSetting, float], now: PoolSetting, measured_s: float) -> dict[PoolSetting, float]:
    """Predicted seconds of a step by setting.

    The part of the step outside the MoE layers is the measured step minus the prediction for the setting in force. If
    the prediction is longer than the whole step that part is taken as zero, and only ratios of predictions count.
    """
    other_s = max(measured_s - moe_s[now], 0.0)
    return {setting: other_s + seconds for setting, seconds in moe_s.items()}


def with_setting(settings: Iterable[PoolSetting], now: PoolSetting) -> tuple[PoolSetting, ...]:
    """The settings in a fixed order, the one in force among them."""
    return tuple(sorted({*settings, now}, key=lambda setting: setting.key))
