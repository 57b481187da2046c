"""A run's logs beside its decisions made again: what is equal, and the first thing that is not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.runtime.decisions.checks import check_trace
from megatron_smartmoe.runtime.decisions.loops import FailedMove
from megatron_smartmoe.runtime.decisions.record import HOMES_LOG, POOL_LOG, WAY_OUT, Start
from megatron_smartmoe.runtime.decisions.replay import Inputs, Replay, Replayed
from megatron_smartmoe.runtime.pool.switchboard import StepTimes
from megatron_smartmoe.spec.placement import SlotChange
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, read_json_lines
from megatron_smartmoe.spec.readers.values import build, whole_table
from megatron_smartmoe.spec.trace import RoutingTrace

Line = dict[str, Any]

STAYS = "stays"  # kind of a re-evaluation of the pool that changed nothing, which is no decision
_MEASURED = ("moved_bytes", "failure", "reached")  # of a decision: what came of it, which no replay can know
_CHANGE = ("layer", "rank", "slot", "before", "after")  # of a slot, as a log has it


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A decision that was not made again as the run made it.

    Attributes:
        log: file that it belongs in.
        iteration: iteration of the decision.
        kind: its kind.
        what: keys that differ, each with the recorded and the replayed value; None where there is no such decision.
    """

    log: str
    iteration: int
    kind: str
    what: Mapping[str, tuple[Any, Any]]


@dataclass(kw_only=True)
class Comparison:
    """What a replay has reproduced.

    Attributes:
        recorded: decisions in the logs, by kind.
        reproduced: those that were made again, equal in everything, by kind.
        differences: the others, and decisions that only the replay made.
        undone: decisions of iterations that a restart ran again.
        later: decisions after the last iteration whose counts were recorded.
        first: the first iteration that was replayed.
        last: the last one.
    """

    recorded: Counter[str] = field(default_factory=Counter)
    reproduced: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    undone: int = 0
    later: int = 0
    first: int = 0
    last: int = 0


def compare_run(directory: Path, starts: Sequence[Start], path: Path, trace: RoutingTrace) -> Comparison:
    """Replay a run from each of its starts up to where the next one took over, and compare.

    Args:
        directory: the run directory.
        starts: its starts, in their order.
        path: file of its routing trace.
        trace: the trace.

    Raises:
        ConfigError: the trace lacks what decisions were made from, or a log is damaged.
    """
    last = int(trace.iteration[-1])
    found = Comparison(first=starts[0].iteration + 1, last=last)
    logs = {name: list(_lines(directory / name)) for name in _logs(directory)}
    for at, start in enumerate(starts):
        # Step 1: what the logs have of this start, and how far it counts.
        later = starts[at + 1 :]
        until = min([one.iteration for one in later], default=last)
        of_start = {name: list(_of_start(name, lines, start, later)) for name, lines in logs.items()}
        live = {name: [line for line in lines if line["iteration"] <= until] for name, lines in of_start.items()}
        left_out = sum(len(of_start[name]) - len(live[name]) for name in logs if name != POOL_LOG)
        found.undone += left_out if later else 0
        found.later += 0 if later else left_out
        # Step 2: make it again.
        if until > start.iteration:
            check_trace(path, trace, start, until)
            _compare(found, live, Replay(directory, start, trace, _inputs(live)).run(until))
    found.differences.sort(key=lambda one: one.iteration)
    return found


def _logs(directory: Path) -> list[str]:
    """Names of the logs of decisions in a run directory."""
    replicas = sorted(path.name for path in directory.glob("replicas-stage*-group*.jsonl"))
    return [name for name in (HOMES_LOG, POOL_LOG, *replicas) if (directory / name).is_file()]


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """The lines of a log, each with the bytes before it.

    Raises:
        ConfigError: it is damaged.
    """
    named = Named(path=path, field="--replay", way_out="Take the line away.")
    begin = 0
    for number, value, line in read_json_lines(named):
        if value is not CUT:
            if not isinstance(value, dict) or type(value.get("iteration")) is not int:
                raise ConfigError(named.at(number), value, "is not a decision: it has no iteration", named.way_out)
            yield begin, value
        begin += len(line)


def _of_start(name: str, lines: Sequence[tuple[int, Line]], start: Start, later: Sequence[Start]) -> Iterator[Line]:
    """The lines that were written between a start and the next one."""
    begin = start.logs.get(name, 0)
    end = min((one.logs.get(name, 0) for one in later), default=None)
    for at, line in lines:
        if at >= begin and (end is None or at < end):
            yield line


def _inputs(live: Mapping[str, Sequence[Line]]) -> Inputs:
    """What was measured, and what failed.

    Raises:
        ConfigError: a line lacks it.
    """
    step_times = {}
    for line in live.get(POOL_LOG, ()):
        given = {"step_s": line.get("step_s"), "noise_s": line.get("noise_s"), "iterations": line.get("timed")}
        step_times[line["iteration"]] = build(StepTimes, given, f"{POOL_LOG}: iteration {line['iteration']}", WAY_OUT)
    failed = {}
    for line in live.get(HOMES_LOG, ()):
        if line.get("failure"):
            field = f"{HOMES_LOG}: iteration {line['iteration']}: reached"
            changes_N5 = whole_table(line.get("reached", []), field, 2)
            if changes_N5.shape[1] not in (0, len(_CHANGE)):
                raise ConfigError(field, changes_N5.shape, f"must have {len(_CHANGE)} numbers a slot", WAY_OUT)
            reached = tuple(SlotChange(**dict(zip(_CHANGE, row, strict=True))) for row in changes_N5.tolist())
            failed[line["iteration"]] = FailedMove(failure=str(line["failure"]), reached=reached)
    return Inputs(step_times=step_times, failed=failed)


def _compare(found: Comparison, live: Mapping[str, Sequence[Line]], replayed: Replayed) -> None:
    """Compare line by line. A decision is found by its log, iteration, kind and group."""
    for log in sorted({*live, *replayed.decisions} - {POOL_LOG}):
        recorded = {_key(line): line for line in live.get(log, ())}
        made = {_key(line): line for one in replayed.decisions.get(log, ()) for line in [json.loads(one.to_line())]}
        for key in sorted({*recorded, *made}):
            _count(found, log, key[1], recorded.get(key), made.get(key))
    decided = {line["iteration"] for line in live.get(HOMES_LOG, ()) if line.get("kind") == "pool"}
    for line in live.get(POOL_LOG, ()):
        iteration = line["iteration"]
        if iteration in decided:
            continue
        setting, reason = replayed.evaluations.get(iteration, (None, None))
        stays = {"iteration": iteration, "setting": line["setting"], "reason": line["reason"]}
        _count(found, POOL_LOG, STAYS, stays, {"iteration": iteration, "setting": setting, "reason": reason})


def _key(line: Line) -> tuple[int, str, int]:
    return line["iteration"], str(line.get("kind")), int(line.get("group", -1))


def _count(found: Comparison, log: str, kind: str, recorded: Line | None, made: Line | None) -> None:
    old, new = (_without_outcome(one or {}) for one in (recorded, made))
    found.recorded[kind] += recorded is not None
    if old == new:
        found.reproduced[kind] += 1
        return
    what = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}
    if recorded is None or made is None:
        what = {"decision": ("made" if recorded is not None else None, "made" if made is not None else None)}
    iteration = (recorded or made or {})["iteration"]
    found.differences.append(Difference(log=log, iteration=iteration, kind=kind, what=what))


def _without_outcome(line: Line) -> Line:
    return {name: value for name, value in line.items() if name not in _MEASURED}
