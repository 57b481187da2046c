"""A trace through several policies, in as many processes as there are cores; the numbers are those of one process.

A peer's rule plans each layer by itself, so its replay is divided into parts of the layers, whose results are put
together in the order of one replay. Ours is one part: its homes are decided for all layers together. What the policies
are compared with (bounds, an even load, the limit) are parts of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from multiprocessing import Value
from multiprocessing.sharedctypes import Synchronized
from threading import Event, Thread
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_smartmoe.simulate.limit import limits_s
from megatron_smartmoe.simulate.policies import SimulatedPolicy, Stats
from megatron_smartmoe.simulate.run import PolicyResult, SimulationSetup, even_load_s, lower_bounds, replay
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace
from megatron_smartmoe.workers import num_cpus, ordered_map

_REFRESH_S = 0.2
_WORTH_WORKERS = 1_000  # plans of a layer, by all policies: about a second


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A policy of a comparison.

    Attributes:
        make: makes it for so many layers.
        layers_apart: whether it plans every layer by itself.
    """

    make: Callable[[int], SimulatedPolicy]
    layers_apart: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """The policies' results, and what they are compared with, for every counted layer and micro-batch."""

    results: list[PolicyResult]
    bounds: FloatArray
    even_s: FloatArray
    limit_s: FloatArray


def compare(
    trace: RoutingTrace, entrants: Sequence[Entrant], setup: SimulationSetup, *, jobs: int | None, flag: str = "--jobs"
) -> Compared:
    """Replay a trace through each policy.

    Args:
        trace: routing counts.
        entrants: the policies.
        setup: ranks, slots and prices.
        jobs: processes at most; None for one per CPU where the replays take longer than starting them.
        flag: what the user sets them with, for errors.
    """
    plans = trace.counts.size // trace.num_experts // min(trace.num_sources, setup.num_ranks) * len(entrants)
    jobs = jobs or default_jobs(plans)
    counter = Value("q", 0)  # records that have been replayed, in all processes
    # Step 1: the parts of the work.
    parts = [_parts(trace.num_layers, jobs if each.layers_apart else 1) for each in entrants]
    tasks: list[Callable[[], Any]] = [
        partial(_replayed, trace, entrant, setup, layers, counter)
        for entrant, layers_P in zip(entrants, parts, strict=True)
        for layers in layers_P
    ]
    num_replays = len(tasks)
    tasks += [partial(each, trace, setup) for each in (limits_s, lower_bounds, even_load_s)]
    # Step 2: run them.
    found = run_tasks(tasks, jobs=jobs, flag=flag, total=trace.num_records * num_replays, unit="record", done=counter)
    # Step 3: put the parts together.
    replays = iter(found[:num_replays])
    limit_s, bounds, even_s = found[num_replays:]
    results = [_joined([next(replays) for _ in layers_P]) for layers_P in parts]
    return Compared(results=results, bounds=bounds, even_s=even_s, limit_s=limit_s)


def default_jobs(plans: int) -> int:
    """One process per CPU for so many plans of a layer, or one where starting others takes longer."""
    return num_cpus() if plans >= _WORTH_WORKERS else 1


def run_tasks[T](
    tasks: Sequence[Callable[[], T]], *, jobs: int, flag: str, total: int, unit: str, done: Synchronized[int]
) -> list[T]:
    """The results of tasks, which run in forked processes: they share all that was loaded before.

    Args:
        tasks: functions without arguments, whose results can be pickled.
        jobs: processes at most.
        flag: what the user sets them with, for errors.
        total: units of work of all tasks, for the bar.
        unit: a unit's name.
        done: counter of units, to which the tasks add.
    """
    # Workers are forked for the first item, which is none, and the bar's threads start after that.
    items = range(-1, len(tasks))
    results = ordered_map(
        lambda item: tasks[item]() if item >= 0 else None,
        items,
        workers=jobs,
        items_per_worker=1,
        in_flight_per_worker=len(items),  # one task takes much longer than another
        start="fork",
        flag=flag,
    )
    with closing(results):
        next(results)
        with _progress(total, unit, done):
            return [result for result in results if result is not None]


def _parts(num_layers: int, parts: int) -> list[slice]:
    """Layers in about equal parts."""
    ends = [num_layers * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends) if begin < end]


def _replayed(
    trace: RoutingTrace, entrant: Entrant, setup: SimulationSetup, layers: slice, counter: Synchronized[int]
) -> PolicyResult:
    """Replay some layers."""
    part = replace(trace, counts=trace.counts[:, layers], layer=trace.layer[layers])
    policy = entrant.make(part.num_layers)
    return replay(part, policy, setup, _counting(trace.num_records, counter), whole=trace)


def _counting(records: int, counter: Synchronized[int]) -> Iterator[int]:
    for record in range(records):
        yield record
        add_one(counter)


def add_one(counter: Synchronized[int]) -> None:
    """Count a unit of work, in any process."""
    with counter.get_lock():
        counter.value += 1


def _joined(parts: Sequence[PolicyResult]) -> PolicyResult:
    """The result of one replay from those of its layers' parts."""
    if len(parts) == 1:
        return parts[0]
    return PolicyResult(
        name=parts[0].name,
        imbalance=_by_record(parts, [part.imbalance for part in parts]),
        layer_s=_by_record(parts, [part.layer_s for part in parts]),
        moving_s=_by_record(parts, [part.moving_s for part in parts]),
        end_N=np.sum([part.end_N for part in parts], axis=0),
        stats=reduce(Stats.plus, [part.stats for part in parts]),
        decisions=[decision for part in parts for decision in part.decisions],
    )


def _by_record(parts: Sequence[PolicyResult], values: Sequence[FloatArray]) -> FloatArray:
    """The parts' entries of the first record, then those of the second, and so on."""
    pieces = [np.split(one, part.end_N[:-1]) for one, part in zip(values, parts, strict=True)]
    return np.concatenate([piece for of_record in zip(*pieces, strict=True) for piece in of_record])


@contextmanager
def _progress(total: int, unit: str, counter: Synchronized[int]) -> Iterator[None]:
    """A bar of what all processes have done."""
    over = Event()
    with tqdm(total=total, unit=unit, leave=False, disable=None) as bar:

        def follow() -> None:
            while not over.wait(_REFRESH_S):
                bar.update(counter.value - bar.n)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
