"""Do no harm: whether a plan is worth its cost, and what to do when it was not.

A plan is taken when its gain per iteration, over the iterations it is expected to last, beats its one-time cost by a
margin. After a plan was taken, nothing moves for a while (hysteresis: the load must not make homes swing to and fro).
Its realised gain is measured; a plan that lost is to be reverted, and the next one has to wait longer, twice as long
after each loss in a row (back-off), until one wins. Every verdict carries its numbers and says in words why.

Alternatives: a fixed period with "any strictly smaller maximum" (SmartMoE 2023) or with a threshold on the balance
alone (MindSpeed) moves weights for gains that never pay for the move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """When a plan is worth it.

    Attributes:
        horizon_iterations: how long a plan is expected to last.
        margin: gain x horizon must be above cost x margin.
        cooldown_iterations: after a plan was taken, none is taken for this long.
        backoff_factor: after each loss in a row the rest grows by this factor.
        max_cooldown_iterations: and never beyond this.
        tolerance: a realised gain above minus this share of the iteration is no loss: the noise of a stopwatch. The
            cost model has none.
    """

    horizon_iterations: int = 500
    margin: float = 2.0
    cooldown_iterations: int = 50
    backoff_factor: float = 2.0
    max_cooldown_iterations: int = 10_000
    tolerance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A decision with its reason.

    Attributes:
        take: go ahead (or, from `realised`, keep).
        why: in words, with the numbers.
        gain_s: seconds per iteration that the plan is predicted to save (or saved).
        cost_s: one-time seconds.
        horizon_iterations: what the gain is multiplied with.
    """

    take: bool
    why: str
    gain_s: float
    cost_s: float
    horizon_iterations: int

    def to_json(self) -> dict[str, Any]:
        """For the decision log."""
        return dict(vars(self))


class Policy:
    """Judges plans one after another; knows when the last one was taken and how many lost in a row."""

    def __init__(self, options: PolicyOptions | None = None) -> None:
        self.options = options or PolicyOptions()
        self.losses = 0
        self.last_taken: int | None = None

    @property
    def cooldown_iterations(self) -> int:
        """Iterations that must pass between two plans, as things stand."""
        rest = self.options.cooldown_iterations * self.options.backoff_factor**self.losses
        return int(min(rest, self.options.max_cooldown_iterations))

    def judge(self, iteration: int, gain_s: float, cost_s: float) -> Verdict:
        """Whether to execute a plan that would save `gain_s` per iteration and costs `cost_s` once."""
        horizon, margin = self.options.horizon_iterations, self.options.margin
        saved_s = gain_s * horizon
        numbers = (
            f"{gain_s * 1e3:.3f} ms x {horizon} iterations = {saved_s:.3f} s, "
            f"cost {cost_s:.3f} s x margin {margin:g} = {cost_s * margin:.3f} s"
        )
        since = None if self.last_taken is None else iteration - self.last_taken
        if gain_s <= 0:
            take, why = False, f"no gain: {numbers}"
        elif saved_s <= cost_s * margin:
            take, why = False, f"does not pay: {numbers}"
        elif since is not None and since < self.cooldown_iterations:
            after = f" after {self.losses} losses in a row" if self.losses else ""
            take, why = False, f"resting: {since} of {self.cooldown_iterations} iterations{after}; {numbers}"
        else:
            take, why = True, f"pays: {numbers}"
            self.last_taken = iteration
        return Verdict(take=take, why=why, gain_s=gain_s, cost_s=cost_s, horizon_iterations=horizon)

    def realised(self, iteration_s: float, gain_s: float, cost_s: float = 0.0, iteration: int | None = None) -> Verdict:
        """Whether to keep a plan that was taken: it is undone when it lost, and when undoing it pays as any move must.

        Args:
            iteration_s: seconds of an iteration, which the tolerance is a share of.
            gain_s: seconds per iteration that the plan really saves.
            cost_s: one-time seconds of undoing it.
            iteration: before which it is undone; None counts the rest from when it was taken.
        """
        lost_s = max(0.0, -gain_s - self.options.tolerance * iteration_s)
        undo_s, price_s = lost_s * self.options.horizon_iterations, cost_s * self.options.margin
        keep = lost_s == 0 or undo_s <= price_s
        self.losses = 0 if lost_s == 0 else self.losses + 1
        if not keep and iteration is not None:
            self.last_taken = iteration
        realised = f"realised {gain_s * 1e3:.3f} ms per iteration"
        if keep and lost_s:
            realised += f", but undoing does not pay: {undo_s:.3f} s against {price_s:.3f} s"
        what = "kept" if keep else f"revert, and rest {self.cooldown_iterations} iterations"
        return Verdict(
            take=keep,
            why=f"{what}: {realised}",
            gain_s=gain_s,
            cost_s=cost_s,
            horizon_iterations=self.options.horizon_iterations,
        )
