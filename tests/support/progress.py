"""Progress of ranks that never ran, for tests of the watchdog's judgement."""

from __future__ import annotations

from typing import Any

from megatron_smartmoe.runtime.progress import NO_PEER, GroupProgress, Pass, Phase, RankProgress
from megatron_smartmoe.runtime.watchdog.verdict import RankReport


def progress(rank: int, groups: dict[int, int] | None = None, **changes: Any) -> RankProgress:
    """A rank in a step that began 20 s ago, where the median step takes half a second.

    Args:
        rank: its number.
        groups: operations posted, by key of a group.
        changes: fields with other values.
    """
    fields: dict[str, Any] = {
        "pid": 1000 + rank,
        "started_ticks": 1,
        "phase": Phase.STEP,
        "iteration": 41,
        "steps": 41,
        "phase_s": 20.0,
        "still_s": 19.0,
        "posted": 500,
        "operation": "all-to-all",
        "group_key": 7,
        "group_name": "expert model parallel group",
        "number": 0,
        "peer": NO_PEER,
        "is_waiting": False,
        "waited_s": 0.0,
        "layer": 3,
        "direction": Pass.BACKWARD,
        "median_step_s": 0.5,
        "floor_s": 8.0,
        "stack_signal": 0,
        "stack_file": 0,
    }
    counted = {key: GroupProgress(key=key, name="", posted=posted, size=2) for key, posted in (groups or {}).items()}
    return RankProgress(rank=rank, **(fields | changes), groups=counted)


def report(rank: int, groups: dict[int, int] | None = None, **changes: Any) -> RankReport:
    """The same as its node's watchdog sends it; `host`, `node`, `state` and `silent_s` are the report's own."""
    own: dict[str, Any] = {"host": "alpha", "node": 0, "state": "S", "silent_s": 0.0}
    own |= {name: changes.pop(name) for name in list(changes) if name in own}
    return RankReport(progress=progress(rank, groups, **changes), **own)
