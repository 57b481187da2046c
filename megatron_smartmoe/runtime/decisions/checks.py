"""Whether a routing trace has what a run's decisions were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.runtime.decisions.record import Start
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

_RECORD_TRACE = "--smartmoe-record-trace FILE"
_RECORD_MICRO_BATCHES = "--smartmoe-record-micro-batches"
_OTHER_TRACE = "Name the run's own with --trace FILE."


def read_trace(path: Path) -> RoutingTrace:
    """The routing trace of a run.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    if not path.exists():
        way_out = f"Name it with --trace FILE if it has been moved; a run with {_RECORD_TRACE} writes one."
        raise ConfigError("--replay", str(path), "the routing trace of the run is not there", way_out)
    return load_trace(path, field="--replay")


def check_trace(path: Path, trace: RoutingTrace, start: Start, until: int) -> None:
    """The trace is of this run, lacks no iteration, and keeps micro-batches apart where decisions depend on them.

    Args:
        path: file of the trace.
        trace: the trace.
        start: a start of the run.
        until: the last iteration that is replayed from it.

    Raises:
        ConfigError: it is not so; names the flag that records what is needed.
    """
    problem = _other_run(trace, start) or _summed(trace, start) or _lacking(trace, start, until)
    if problem is not None:
        raise ConfigError("--replay", str(path), *problem)


def _other_run(trace: RoutingTrace, start: Start) -> tuple[str, str] | None:
    """Rule and way out where the sizes are of another run."""
    if missing := set(start.layers) - set(trace.layer.tolist()):
        return f"the trace has no layer {min(missing)}, and the run has", _OTHER_TRACE
    sources = start.groups * start.num_ranks
    if (trace.num_experts, trace.num_sources) != (start.num_experts, sources):
        found = f"the trace has {trace.num_experts} experts and {trace.num_sources} source ranks"
        return f"{found}, and the run {start.num_experts} and {sources}", _OTHER_TRACE
    if trace.has_micro_batches and trace.counts.shape[3] < start.passes:
        found = f"the trace has {trace.counts.shape[3]} micro-batches of an iteration"
        return f"{found}, and the run {start.passes}", _OTHER_TRACE
    return None


def _summed(trace: RoutingTrace, start: Start) -> tuple[str, str] | None:
    """Rule and way out where the trace has the sum of what decisions saw apart."""
    sees_passes = start.plans_from_history or start.pool is not None
    if sees_passes and start.passes > 1 and not trace.has_micro_batches:
        rule = f"the trace sums the {start.micro_batches} micro-batches of an iteration, and decisions saw each of them"
        return rule, f"Train with {_RECORD_MICRO_BATCHES}, beside {_RECORD_TRACE}."
    if start.expert_shares > 1 and "auto" in start.modes:
        rule = "ranks that share an expert split its tokens each for itself, and the trace has their sum"
        return rule, "Runs with --expert-tensor-parallel-size 1, or without auto, can be replayed."
    return None


def _lacking(trace: RoutingTrace, start: Start, until: int) -> tuple[str, str] | None:
    """Rule and way out where iterations are missing."""
    wanted = np.arange(start.iteration + 1, until + 1)
    missing = np.setdiff1d(wanted, trace.iteration)
    if not missing.size:
        return None
    rule = f"the trace lacks {missing.size} of the {len(wanted)} iterations {wanted[0]} to {until}, the first of them "
    rule += f"{missing[0]}, and decisions depend on each"
    return rule, f"Train with {_RECORD_TRACE} from the start, and keep the file when the run resumes."
