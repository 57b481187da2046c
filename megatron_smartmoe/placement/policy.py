"""Do no harm: whether a plan is worth its cost, and what to do when it was not.

A plan is taken when its predicted gain per iteration, over the iterations it is expected to last, beats its one-time
cost by a margin. After a move there is a cooldown in which nothing moves (hysteresis: homes must not swing to and fro
with the load). Then the gain is found again on what followed; a move that lost time is reverted, and each loss in a row
doubles the cooldown (back-off), until a move gains. A move that promises several times what the losing ones were wrong
by need not wait: early in training a load changes so much that a first move loses a little, and the next one would
save a hundred times as much. Every verdict states its reason with the numbers.

Alternatives: a fixed period with "any strictly smaller maximum" (SmartMoE 2023) or with a threshold on the balance
alone (MindSpeed) moves weights for gains that never pay for the move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# For `PolicyOptions.tolerance` where homes move between nodes: swaps there pay for a fraction of a percent, and whether
# a load's replicas take two transfers in a row or three changes a layer by up to 1% (64 ranks on 8 nodes, 12.5 GB/s).
BETWEEN_NODES_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """When a plan is worth its cost.

    Attributes:
        horizon_iterations: iterations that a plan is expected to last.
        margin: gain x horizon must be above cost x margin; a gain that is above margin x what losing moves were wrong
            by need not wait for the cooldown.
        cooldown_iterations: iterations after a move in which no other is made.
        backoff_factor: each loss in a row multiplies the cooldown by this.
        max_cooldown_iterations: the longest cooldown.
        tolerance: a measured gain above minus this share of an iteration is no loss but the spread of the measurement;
            0 where the cost model compares.
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
        take: whether to execute the plan (from `realised`: to keep it).
        why: the reason in words, with the numbers.
        gain_s: seconds per iteration that the plan is predicted to save (from `realised`: saved).
        cost_s: one-time seconds.
        horizon_iterations: iterations that the gain is multiplied with.
    """

    take: bool
    why: str
    gain_s: float
    cost_s: float
    horizon_iterations: int


class Policy:
    """Judges plans one after another.

    Attributes:
        losses: losing moves in a row.
        last_taken: iteration of the last move; None before the first.
        wrong_s: what the losing moves in a row were predicted to save beyond what they did, the most of them; infinite
            where that is not known.
    """

    def __init__(self, options: PolicyOptions | None = None) -> None:
        self.options = options or PolicyOptions()
        self.losses = 0
        self.last_taken: int | None = None
        self.wrong_s = 0.0

    @property
    def cooldown_iterations(self) -> int:
        """Iterations that must pass between two moves, after the losses so far."""
        iterations = self.options.cooldown_iterations * self.options.backoff_factor**self.losses
        return int(min(iterations, self.options.max_cooldown_iterations))

    def judge(self, iteration: int, gain_s: float, cost_s: float) -> Verdict:
        """Whether to execute a plan that would save `gain_s` per iteration and costs `cost_s` once."""
        horizon, margin = self.options.horizon_iterations, self.options.margin
        saved_s = gain_s * horizon
        numbers = (
            f"{gain_s * 1e3:.3f} ms x {horizon} iterations = {saved_s:.3f} s, "
            f"cost {cost_s:.3f} s x margin {margin:g} = {cost_s * margin:.3f} s"
        )
        since = None if self.last_taken is None else iteration - self.last_taken
        is_cooling = since is not None and since < self.cooldown_iterations
        lost = f"{self.losses} losing move" + ("" if self.losses == 1 else "s in a row")
        if gain_s <= 0:
            take, why = False, f"no gain: {numbers}"
        elif saved_s <= cost_s * margin:
            take, why = False, f"does not pay: {numbers}"
        elif is_cooling and not (self.losses and gain_s > margin * self.wrong_s):
            after = f" ({lost})" if self.losses else ""
            take, why = False, f"cooldown {since}/{self.cooldown_iterations} iterations{after}; {numbers}"
        else:
            waived = (
                f"; no cooldown: {lost} promised at most {self.wrong_s * 1e3:.3f} ms too much" if is_cooling else ""
            )
            take, why = True, f"pays: {numbers}{waived}"
            self.last_taken = iteration
        return Verdict(take=take, why=why, gain_s=gain_s, cost_s=cost_s, horizon_iterations=horizon)

    def realised(
        self,
        iteration_s: float,
        gain_s: float,
        cost_s: float = 0.0,
        iteration: int | None = None,
        predicted_s: float = math.inf,
    ) -> Verdict:
        """Whether to keep a plan that was taken; one that loses time is reverted if that pays, as any move must.

        Args:
            iteration_s: seconds of an iteration, which the tolerance is a share of.
            gain_s: seconds per iteration that the plan was found to save on what followed it.
            cost_s: one-time seconds of reverting it.
            iteration: the iteration before which it would be reverted, from which the cooldown counts; with None it
                counts from the iteration in which the plan was taken.
            predicted_s: seconds per iteration that the plan was predicted to save; infinite if that is not known.
        """
        lost_s = max(0.0, -gain_s - self.options.tolerance * iteration_s)
        saved_s, price_s = lost_s * self.options.horizon_iterations, cost_s * self.options.margin
        keep = lost_s == 0 or saved_s <= price_s
        self.losses = 0 if lost_s == 0 else self.losses + 1
        self.wrong_s = 0.0 if lost_s == 0 else max(self.wrong_s, predicted_s - gain_s)
        if not keep and iteration is not None:
            self.last_taken = iteration
        outcome = "kept" if keep else f"reverted, next attempt in {self.cooldown_iterations} iterations"
        if keep and lost_s:
            outcome += f", reverting does not pay ({saved_s:.3f} s against {price_s:.3f} s)"
        return Verdict(
            take=keep,
            why=f"found {gain_s * 1e3:.3f} ms/iter on the loads since: {outcome}",
            gain_s=gain_s,
            cost_s=cost_s,
            horizon_iterations=self.options.horizon_iterations,
        )
