"""`smartmoe simulate --replay RUN`: make a run's decisions again, and compare them with its logs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_smartmoe.runtime.decisions.checks import read_trace
from megatron_smartmoe.runtime.decisions.compare import STAYS, Comparison, Difference, compare_run
from megatron_smartmoe.runtime.decisions.record import Start, read_starts

_KINDS = {
    "homes": "re-evaluations of homes",
    "review": "reviews of a move of homes",
    "replicas": "plans of replicas",
    "replans": "iterations with layers planned anew",
    "pool": "switches of the pool and reviews of them",
    STAYS: "re-evaluations of the pool that changed nothing",
}
_SHOWN = 160  # characters of a value that differs


def main(argv: Sequence[str] | None = None) -> int:
    """Replay a run; 1 when a decision differs."""
    parser = argparse.ArgumentParser(prog="smartmoe simulate --replay", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    starts = read_starts(options.run_dir)
    path = options.trace or Path(starts[-1].trace)
    trace = read_trace(path)
    # The controller compares its decisions over all ranks: here there is one.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = compare_run(options.run_dir, starts, path, trace)
    finally:
        dist.destroy_process_group()
    print(json.dumps(as_json(found, starts, path), indent=2) if options.format == "json" else as_text(found, starts))
    return 1 if found.differences else 0


def _decisions(counts: Counter[str]) -> int:
    return sum(number for kind, number in counts.items() if kind != STAYS)


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
