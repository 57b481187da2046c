"""What a fault may lead to, and the verdict on what it did lead to.

Allowed are two ends: the losses of the uninterrupted run, or a stop with one clear line within the stated time, after
which the same command gives those losses. Never a wrong loss, never a job that hangs, never a stop that says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.reliability import fault_link
from scripts.reliability.fault_job import GRACE_S, End, clear_lines
from scripts.reliability.fault_plan import ON_FILES, Fault

REPORTED = ("refuse memory", "long pause")  # training continues, and a line says what was wrong
GOOD = ("same losses", "stopped", "refused")
BAD = ("wrong losses", "hangs", "unclear", "slow to stop", "did not strike")
REFUSED_S = 120.0  # to read a damaged checkpoint and say so, ranks' start included, on a busy machine
STOPPED_S = GRACE_S + 5  # the launcher's grace, and what ending processes takes on a busy machine
LINK_S = 3 * 60.0 * fault_link.TIMEOUT_MINUTES  # a migration may wait before the collective after it does
# The clear line of each kind, where the ranks print it themselves.
LINES = {
    "disk full": r"No space left on device",
    "read-only": r"Read-only file system",
    "refuse memory": r"no memory for \d+ bytes of staging",
    "flipped file": r"(error: |Error: ).*(iter_\d+|latest_checkpointed_iteration)",
    "truncated file": r"(error: |Error: ).*(iter_\d+|latest_checkpointed_iteration)",
    "missing file": r"(error: |Error: ).*(iter_\d+|latest_checkpointed_iteration)",
    "cut the link": r"(rank \d+.*(hold|not answer|not heard|stopped)|Timed out|timed out|Connection)",
}
LAUNCHER_LINES = {
    "kill": r"rank {victim} on .* SIGKILL",
    "long pause": r"WARNING: this step has taken .* the slowest rank is {victim} of .* stopped by a signal",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One word for the outcome, the line that a user saw, and what is wrong if something is."""

    outcome: str
    line: str
    details: str = ""


def judge(
    fault: Fault,
    end: End,
    resumed: End | None,
    losses: Sequence[tuple[int, float]],
    reference: Mapping[int, float],
    tolerance: float,
) -> Verdict:
    """The verdict on one fault.

    Args:
        fault: what struck.
        end: of the job that it struck.
        resumed: of the same command given again where the first had not ended well; None where it had.
        losses: (iteration, loss) of all lines that both wrote.
        reference: the losses of the uninterrupted run.
        tolerance: relative; 0 where the bits are promised.
    """
    pattern = (LAUNCHER_LINES if fault.launched else {}).get(fault.kind) or LINES.get(fault.kind, "")
    pattern = pattern.replace("{victim}", str(fault.victim))
    lines = clear_lines(end.lines, pattern) if pattern else []
    line = lines[-1][:300] if lines else ""

    def verdict(outcome: str, details: str = "") -> Verdict:
        return Verdict(outcome=outcome, line=line, details=details)

    wrong = [i for i, loss in losses if i in reference and abs(loss - reference[i]) > tolerance * abs(reference[i])]
    if wrong:
        return verdict("wrong losses", f"in iterations {sorted(set(wrong))}")
    if end.hung or (resumed is not None and resumed.hung):
        return verdict("hangs", f"status {end.status}" + (f", resumed {resumed.status}" if resumed else ""))
    if not end.struck and fault.kind not in ON_FILES:
        return verdict("did not strike")
    missing = sorted(set(reference) - {i for i, _ in losses})
    if end.good:
        if fault.kind in REPORTED and not lines:
            return verdict("unclear", f"no line like {pattern}")
        if missing and not lines:
            return verdict("wrong losses", f"no losses of iterations {missing}")
        return verdict("same losses")
    if pattern and not lines:
        return verdict("unclear", f"status {end.status}, no line like {pattern}; last: {last_line(end)}")
    limit_s = {"cut the link": LINK_S, **dict.fromkeys(ON_FILES, REFUSED_S)}.get(fault.kind, STOPPED_S)
    if end.seconds > limit_s:
        return verdict("slow to stop", f"after {end.seconds} s")
    if resumed is None or not resumed.good:
        details = f"resumed: {resumed.status}, {last_line(resumed)}" if resumed else "was not resumed"
        return verdict("unclear", details)
    if missing and fault.kind != "disk full":
        return verdict("wrong losses", f"no losses of iterations {missing}")
    return verdict("refused" if fault.kind in ON_FILES else "stopped")


def last_line(end: End) -> str:
    """The last line that says something."""
    return next((line.strip()[:200] for line in reversed(end.lines) if line.strip()), "")
