"""The switchboard: which setting of the pool is in force, judged by the cost model and the stopwatch.

Method. At a look each setting's MoE layers are predicted under the load as it was lately (`pool_prediction`);
everything else of the step is what was measured minus the prediction for the setting in force. `planner.pool.choose`
says whether another setting wins more than a margin. A switch is a trial: at the next look the measured step is
compared with the one before the switch, and a step that became longer by more than its noise and a tolerance brings the
old setting back. The one that lost rests, twice as long after each loss (`placement.policy.Policy`, one a setting).

The stopwatch judges, because the cost model is what proposed the switch. What else changed between the two looks, above
all the load, is laid at the switch's door; a wrong verdict costs one rest. (The homes loop, whose moves are dear,
reviews by the model instead: see `placement.review`.)

No torch, no clock, no process group: rank 0 runs it for all, and every switch can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.policy import Policy, PolicyOptions
from megatron_smartmoe.planner.pool import MARGIN, PoolSetting, choose

FEWEST_TIMES = 5  # of iterations, for a verdict on a switch
NOISE_WIDTHS = 2.0  # standard errors of two medians' difference that are taken for noise
TOLERANCE = 0.02  # of a step, that it may become longer without a switch back
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_MEDIAN_TO_MEAN = 1.2533  # standard error of the median over that of the mean


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Step times since the last switch.

    Attributes:
        step_s: median, of the slowest rank.
        noise_s: standard error of that median.
        iterations: that were timed.
    """

    step_s: float
    noise_s: float
    iterations: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Measured:
        """Of one rank's step times, at least one. Medians: a checkpoint in between is not the setting's fault."""
        times = np.asarray(seconds)
        median = float(np.median(times))
        spread = _MAD_TO_SIGMA * float(np.median(np.abs(times - median)))
        return cls(step_s=median, noise_s=_MEDIAN_TO_MEAN * spread / math.sqrt(len(times)), iterations=len(times))


@dataclass(frozen=True, kw_only=True)
class PoolVerdict:
    """What a look at the pool came to.

    Attributes:
        setting: in force from now on.
        before: in force until now.
        reason: of what kind the reason is; a look that changes nothing is told when this changes.
        why: in words, with the numbers.
        predicted_gain_s: seconds a step that a switch promises; of a verdict on a switch, what it had promised.
        realised_gain_s: seconds a step that a switch saved, from the stopwatch.
    """

    setting: PoolSetting
    before: PoolSetting
    reason: str
    why: str
    predicted_gain_s: float | None = None
    realised_gain_s: float | None = None

    @property
    def switched(self) -> bool:
        """Whether another setting is in force than before."""
        return self.setting != self.before

    @property
    def is_decision(self) -> bool:
        """Whether it is a switch or the verdict on one, which are told each time."""
        return self.switched or self.realised_gain_s is not None


@dataclass(frozen=True, kw_only=True)
class SwitchboardOptions:
    """When a switch is worth it.

    Attributes:
        margin: share of the step that another setting must win.
        tolerance: share of the step that it may become longer without a switch back.
        cooldown_iterations: how long a setting rests, doubled by each of its losses in a row.
    """

    margin: float = MARGIN
    tolerance: float = TOLERANCE
    cooldown_iterations: int = 100


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A switch on which there is no verdict yet."""

    before: PoolSetting
    measured: Measured
    predicted_gain_s: float


class Switchboard:
    """Keeps the setting in force.

    Args:
        now: the setting that the run starts with.
        iteration: the last one before the run.
        options: see SwitchboardOptions.
    """

    def __init__(self, now: PoolSetting, iteration: int, options: SwitchboardOptions | None = None) -> None:
        self.now, self.options = now, options or SwitchboardOptions()
        self._since = iteration  # of the last switch
        self._trial: _Trial | None = None
        self._policies: dict[PoolSetting, Policy] = {}

    def look(
        self, iteration: int, measured: Measured, predict: Callable[[], Mapping[PoolSetting, float]]
    ) -> PoolVerdict:
        """Judge the last switch, or look for a better setting.

        Args:
            iteration: that has just ended.
            measured: under the setting in force.
            predict: seconds of a step's MoE layers by setting, under the load as it is; must have the one in force.
        """
        if self._trial is not None:
            return self._review(iteration, measured, self._trial)
        seconds = step_seconds(predict(), self.now, measured.step_s)
        rested = {setting: each for setting, each in seconds.items() if not self._rests(setting, iteration)}
        since = iteration - self._since
        choice = choose(self.now, rested, measured_s=measured.step_s, since_switch=since, margin=self.options.margin)
        if not choice.switched:
            return self._stay(choice.reason, choice.why)
        gain_s = (1 - seconds[choice.setting] / seconds[self.now]) * measured.step_s
        self._policy(choice.setting).judge(iteration, gain_s, cost_s=0.0)  # notes when it was taken
        self._trial = _Trial(before=self.now, measured=measured, predicted_gain_s=gain_s)
        return self._switch(choice.setting, iteration, choice.reason, choice.why, gain_s)

    def _review(self, iteration: int, measured: Measured, trial: _Trial) -> PoolVerdict:
        """Keep the setting on trial, or go back to the one before."""
        if measured.iterations < FEWEST_TIMES:
            return self._stay("trial", f"{measured.iterations} steps timed since the switch, {FEWEST_TIMES} are needed")
        self._trial = None
        gain_s = trial.measured.step_s - measured.step_s
        noise_s = NOISE_WIDTHS * math.hypot(trial.measured.noise_s, measured.noise_s)
        beyond_s = gain_s if gain_s >= 0 else min(gain_s + noise_s, 0.0)
        policy = self._policy(self.now)
        keep = policy.realised(iteration_s=trial.measured.step_s, gain_s=beyond_s).take
        why = (
            f"a step takes {measured.step_s:.4g} s, before the switch {trial.measured.step_s:.4g} s "
            f"(promised {trial.predicted_gain_s:+.3g} s, realised {gain_s:+.3g} s, noise {noise_s:.2g} s)"
        )
        if keep:
            return self._stay("kept", f"kept: {why}", trial.predicted_gain_s, gain_s)
        why = f"back: {why}; {self.now.key} rests {policy.cooldown_iterations} iterations"
        policy.last_taken = iteration  # it rests from now on
        return self._switch(trial.before, iteration, "loss", why, trial.predicted_gain_s, gain_s)

    def _rests(self, setting: PoolSetting, iteration: int) -> bool:
        """Whether a setting that lost has to wait."""
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


def step_seconds(moe_s: Mapping[PoolSetting, float], now: PoolSetting, measured_s: float) -> dict[PoolSetting, float]:
    """Seconds of a step by setting.

    What is outside the MoE layers is what was measured minus what they are predicted to take now; if they are predicted
    to take more than the whole step, nothing is left for it and only the ratios of the predictions count.
    """
    other_s = max(measured_s - moe_s[now], 0.0)
    return {setting: other_s + seconds for setting, seconds in moe_s.items()}


def with_setting(settings: Iterable[PoolSetting], now: PoolSetting) -> tuple[PoolSetting, ...]:
    """The settings in a fixed order, the one in force among them."""
    return tuple(sorted({*settings, now}, key=lambda setting: setting.key))
