"""`smartmoe simulate --replay RUN`: make a run's decisions again, and compare them with its logs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.runtime.decisions.loops import FailedMove
from megatron_smartmoe.runtime.decisions.record import HOMES_LOG, POOL_LOG, WAY_OUT, Start, read_starts
from megatron_smartmoe.runtime.decisions.replay import Inputs, Replay, Replayed
from megatron_smartmoe.runtime.pool.switchboard import StepTimes
from megatron_smartmoe.spec.placement import SlotChange
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, read_json_lines
from megatron_smartmoe.spec.readers.values import build, whole_table
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

Line = dict[str, Any]
_MEASURED = ("moved_bytes", "failure", "reached")  # of a decision: what came of it, which no replay can know
_KINDS = {
    "homes": "re-evaluations of homes",
    "review": "reviews of a move of homes",
    "replicas": "plans of replicas",
    "replans": "iterations with layers planned anew",
    "pool": "switches of the pool and reviews of them",
    "stays": "re-evaluations of the pool that changed nothing",
}
_RECORD_TRACE = "--smartmoe-record-trace FILE"
_RECORD_MICRO = "--smartmoe-record-micro-batches"
_OTHER_TRACE = "Name the run's own with --trace FILE."
_CHANGE = ("layer", "rank", "slot", "before", "after")  # of a slot, as a log has it
_SHOWN = 160  # characters of a value that differs


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


def main(argv: Sequence[str] | None = None) -> int:
    """Replay a run; 1 when a decision differs."""
    parser = argparse.ArgumentParser(prog="smartmoe simulate --replay", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    # The controller compares its decisions over all ranks: here there is one.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        starts = read_starts(options.run_dir)
        path = options.trace or Path(starts[-1].trace)
        found = compare_run(options.run_dir, starts, _trace(path))
    finally:
        dist.destroy_process_group()
    print(json.dumps(as_json(found, starts, path), indent=2) if options.format == "json" else as_text(found, starts))
    return 1 if found.differences else 0


def _trace(path: Path) -> RoutingTrace:
    if not path.exists():
        rule = "the routing trace of the run is not there"
        way_out = f"Name it with --trace FILE if it has been moved; a run with {_RECORD_TRACE} writes one."
        raise ConfigError("--replay", str(path), rule, way_out)
    return load_trace(path, field="--replay")


def compare_run(directory: Path, starts: Sequence[Start], trace: RoutingTrace) -> Comparison:
    """Replay a run from each of its starts up to where the next one took over, and compare.

    Args:
        directory: the run directory.
        starts: its starts, in their order.
        trace: its routing trace.

    Raises:
        ConfigError: the trace lacks what decisions were made from; names the flag that records it.
    """
    _check_trace(starts, trace)
    last = int(trace.iteration[-1])
    found = Comparison(first=starts[0].iteration + 1, last=last)
    logs = {name: list(_lines(directory / name)) for name in _logs(directory)}
    for at, start in enumerate(starts):
        later = starts[at + 1 :]
        until = min([one.iteration for one in later], default=last)
        of_start = {name: list(_of_start(name, lines, start, later)) for name, lines in logs.items()}
        live = {name: [line for line in lines if line["iteration"] <= until] for name, lines in of_start.items()}
        left_out = sum(len(of_start[name]) - len(live[name]) for name in logs if name != POOL_LOG)
        found.undone += left_out if later else 0
        found.later += 0 if later else left_out
        if until > start.iteration:
            _check_whole(trace, start, until)
            replayed = Replay(directory, start, trace, _inputs(live)).run(until)
            _compare(found, live, replayed)
    found.differences.sort(key=lambda one: one.iteration)
    return found


def _check_trace(starts: Sequence[Start], trace: RoutingTrace) -> None:
    """The trace is of this run, and keeps micro-batches apart where decisions depend on them."""
    for start in starts:
        sources = start.groups * start.num_ranks
        if missing := set(start.layers) - set(trace.layer.tolist()):
            raise _refused(f"the trace has no layer {min(missing)}: it is of another run", _OTHER_TRACE)
        if (trace.num_experts, trace.num_sources) != (start.num_experts, sources):
            rule = f"the trace has {trace.num_experts} experts and {trace.num_sources} source ranks, the run "
            rule += f"{start.num_experts} and {sources}"
            raise _refused(rule, _OTHER_TRACE)
        sees_passes = start.plans_from_history or start.pool is not None
        if sees_passes and start.passes > 1 and not trace.has_micro_batches:
            rule = f"the trace sums the {start.micro_batches} micro-batches of an iteration, and replicas are planned "
            raise _refused(f"{rule}from each", f"Train with {_RECORD_MICRO}, beside {_RECORD_TRACE}.")
        if trace.has_micro_batches and trace.counts.shape[3] < start.passes:
            rule = f"the trace has {trace.counts.shape[3]} micro-batches, and an iteration of the run {start.passes}"
            raise _refused(rule, _OTHER_TRACE)
        if start.expert_shares > 1 and "auto" in start.modes:
            rule = "ranks that share an expert split its tokens each for itself, and the trace has their sum"
            raise _refused(rule, "Runs with --expert-tensor-parallel-size 1, or without auto, can be replayed.")


def _check_whole(trace: RoutingTrace, start: Start, until: int) -> None:
    """No iteration is missing: what replicas and homes are planned from is made of all of them."""
    wanted = np.arange(start.iteration + 1, until + 1)
    missing = np.setdiff1d(wanted, trace.iteration)
    if missing.size:
        rule = f"the trace lacks {missing.size} of the {len(wanted)} iterations {wanted[0]} to {until}, the first of "
        rule += f"them {missing[0]}, and decisions depend on each"
        raise _refused(rule, f"Train with {_RECORD_TRACE} from the start, and keep the file when the run resumes.")


def _refused(rule: str, way_out: str) -> ConfigError:
    return ConfigError("--replay", "trace", rule, way_out)


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
        _count(found, POOL_LOG, "stays", stays, {"iteration": iteration, "setting": setting, "reason": reason})


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


def _decisions(counts: Counter[str]) -> int:
    return sum(number for kind, number in counts.items() if kind != "stays")


def as_text(found: Comparison, starts: Sequence[Start]) -> str:
    """The comparison in words."""
    made, recorded = _decisions(found.reproduced), _decisions(found.recorded)
    resumed = [start.iteration for start in starts if start.iteration]
    after = f", resumed after {', '.join(map(str, resumed))}" if resumed else ""
    lines = [f"{made} of {recorded} decisions reproduced (iterations {found.first} to {found.last}{after})"]
    lines += [
        f"  {found.reproduced[kind]:>6} of {found.recorded[kind]:<6} {text}"
        for kind, text in _KINDS.items()
        if found.recorded[kind]
    ]
    if found.undone:
        lines.append(f"  left out: {found.undone} decisions of iterations that a restart ran again")
    if found.later:
        lines.append(f"  left out: {found.later} decisions after iteration {found.last}, the last one in the trace")
    if found.differences:
        lines += _difference(found.differences[0])
    return "\n".join(lines)


def _difference(first: Difference) -> list[str]:
    lines = [f"the first that differs: {first.kind} of iteration {first.iteration} ({first.log})"]
    for name, (old, new) in first.what.items():
        old_text, new_text = (_cut(value) for value in (old, new))
        lines += [f"  {name:<10} recorded {old_text}", f"  {'':<10} replayed {new_text}"]
    return lines


def _cut(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def as_json(found: Comparison, starts: Sequence[Start], trace: Path) -> dict[str, Any]:
    """The comparison for programs."""
    first = found.differences[0] if found.differences else None
    return {
        "decisions": _decisions(found.recorded),
        "reproduced": _decisions(found.reproduced),
        "by_kind": {
            kind: {"decisions": found.recorded[kind], "reproduced": found.reproduced[kind]}
            for kind in _KINDS
            if found.recorded[kind]
        },
        "iterations": [found.first, found.last],
        "starts": [start.iteration for start in starts],
        "undone": found.undone,
        "later": found.later,
        "differences": len(found.differences),
        "first_difference": None
        if first is None
        else {
            "log": first.log,
            "iteration": first.iteration,
            "kind": first.kind,
            "what": {name: {"recorded": old, "replayed": new} for name, (old, new) in first.what.items()},
        },
        "trace": str(trace),
    }
