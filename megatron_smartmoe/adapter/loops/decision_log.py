"""Where decisions are logged: a line for people, `smartmoe.jsonl` for programs, TensorBoard scalars for curves."""

from __future__ import annotations

from megatron_smartmoe.adapter.records.scalars import write_scalars
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.runtime.controller import Moved, with_outcome


class DecisionLog:
    """Rank 0 prints and writes the file; the rank that has Megatron's TensorBoard writer writes the scalars.

    Args:
        run: the run whose decisions they are.
        dry: whether nothing is moved, whatever is decided.
    """

    def __init__(self, run: Run, *, dry: bool) -> None:
        self._run, self._is_reporter = run, run.is_reporter
        self._dry, self._home_slots = dry, run.args.num_experts // run.ranks.ep_size

    def decided(self, decision: Decision, before: float, after: float, moved: Moved | None) -> None:
        """See `runtime.controller.Reporter`."""
        if moved is not None:
            decision = with_outcome(decision, moved)
        if self._is_reporter:
            print(self._line(decision, before, after, moved), flush=True)
            self._run.append("smartmoe.jsonl", decision.to_line())
        scalars = {"smartmoe/imbalance": after if moved is not None else before}
        if decision.predicted_gain_s is not None:
            scalars["smartmoe/predicted gain (ms)"] = decision.predicted_gain_s * 1e3
        if decision.realised_gain_s is not None:
            scalars["smartmoe/realised gain (ms)"] = decision.realised_gain_s * 1e3
        if moved is not None:
            scalars["smartmoe/migration (MiB)"] = moved.wire_bytes / 2**20
            scalars["smartmoe/migration (s)"] = moved.seconds
            scalars["smartmoe/experts moved"] = float(self._num_experts(decision))
        write_scalars(scalars, decision.iteration)

    def switched(self, decision: Decision, index: int) -> None:
        """Log a switch between settings of the pool, or the review of one.

        Args:
            decision: the decision, with the settings' names.
            index: number of the setting in force, for the curve.
        """
        if self._is_reporter:
            self._run.append("smartmoe.jsonl", decision.to_line())
        scalars = {"smartmoe/pool setting": float(index)}
        if decision.realised_gain_s is not None:
            scalars["smartmoe/pool realised gain (ms)"] = decision.realised_gain_s * 1e3
        write_scalars(scalars, decision.iteration)

    def _num_experts(self, decision: Decision) -> int:
        """Experts whose home changes; replicas that are dropped with a home are none."""
        return len({(change.layer, change.after) for change in decision.changes if change.slot < self._home_slots})

    def _line(self, decision: Decision, before: float, after: float, moved: Moved | None) -> str:
        """` smartmoe: iteration 100 | homes: ... | max/mean tokens per rank 1.33 -> 1.02 | ... |`"""
        experts = self._num_experts(decision)
        parts = [f"smartmoe: iteration {decision.iteration:8d}"]
        if decision.kind == "review":
            predicted = f"predicted {(decision.predicted_gain_s or 0.0) * 1e3:.3f} ms/iter"
            parts.append(f"homes: review of the last move: {predicted}, {decision.why}")
        else:
            verb = "moved" if moved is not None else "would move" if decision.taken and self._dry else "not moved"
            parts.append(f"homes: {experts} expert{'s' if experts != 1 else ''} {verb}")
        parts.append(f"max/mean tokens per rank {before:.3f} -> {after:.3f}")
        if decision.kind != "review":
            parts.append(decision.why)
        if moved is not None:
            parts.append(f"{moved.wire_bytes / 2**20:.1f} MiB in {moved.seconds:.2f} s")
        return " " + " | ".join(parts) + " |"

    def warn(self, iteration: int, text: str) -> None:
        """See `runtime.controller.Reporter`. What concerns one rank is printed there, what concerns all on rank 0."""
        if self._is_reporter or not text.startswith("the ranks"):
            print(f" smartmoe: iteration {iteration:8d} | WARNING: {text} |", flush=True)
