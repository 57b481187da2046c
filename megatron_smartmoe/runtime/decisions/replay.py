"""A run's decisions made again, iteration by iteration, from its recorded start, its trace and its step times."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.runtime.decisions.loops import FailedMove, ReplayedHomes, ReplayedPool, ReplayedReplicas
from megatron_smartmoe.runtime.decisions.record import (
    HOMES_LOG,
    REPLICAS_LOG,
    Start,
    homes_state_file,
    read_state,
    replicas_state_file,
)
from megatron_smartmoe.runtime.pool.switchboard import StepTimes
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a replay takes from the logs because nothing can compute it.

    Attributes:
        step_times: measured step times, by the iteration of the pool's re-evaluation.
        failed: migrations that failed, by iteration.
    """

    step_times: Mapping[int, StepTimes]
    failed: Mapping[int, FailedMove]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay has decided.

    Attributes:
        decisions: by the log that they belong in.
        evaluations: setting and reason of the pool's re-evaluations, by iteration.
    """

    decisions: Mapping[str, list[Decision]]
    evaluations: Mapping[int, tuple[str, str]]


class Replay:
    """The loops of a run from one of its starts on.

    Args:
        directory: the run directory.
        start: the start.
        trace: the run's trace.
        inputs: what comes from the logs.
    """

    def __init__(self, directory: Path, start: Start, trace: RoutingTrace, inputs: Inputs) -> None:
        self._start, self._trace, self._inputs = start, trace, inputs
        self._rows = [int(np.flatnonzero(trace.layer == number)[0]) for number in start.layers]
        self._homes = self._pool = None
        self._replicas: dict[tuple[int, int], ReplayedReplicas] = {}
        if start.homes is not None:
            state = read_state(directory, homes_state_file(start.iteration))
            self._homes = ReplayedHomes(start.homes, state, start, inputs.failed)
        if start.plans_from_history:
            for stage, group in np.ndindex(len(start.stages), start.groups):
                state = read_state(directory, replicas_state_file(start.iteration, stage, group))
                self._replicas[stage, group] = ReplayedReplicas(start, stage, group, state)
        if start.pool is not None:
            self._pool = ReplayedPool(start.pool, start)
        self._recent: deque[IntArray] = deque(maxlen=start.pool.iterations if start.pool is not None else 1)
        self._evaluations: dict[int, tuple[str, str]] = {}

    def run(self, last: int) -> Replayed:
        """Replay up to an iteration, all of whose counts are in the trace."""
        first = self._start.iteration + 1
        record = int(np.searchsorted(self._trace.iteration, first))
        iterations = range(first, last + 1)
        for iteration in tqdm(iterations, desc="replay", unit="iteration", leave=False, disable=None):
            self._step(iteration, self._trace.groups(self._start.num_ranks, record)[self._rows])
            record += 1
        logs: dict[str, list[Decision]] = {}
        for loop in (self._homes, self._pool):
            logs.setdefault(HOMES_LOG, []).extend(loop.decisions if loop is not None else [])
        for (stage, group), replicas in self._replicas.items():
            logs[REPLICAS_LOG.format(stage=stage, group=group)] = replicas.decisions
        return Replayed(decisions=logs, evaluations=self._evaluations)

    def _step(self, iteration: int, counts_LGPRE: IntArray) -> None:
        """One iteration, in the order of training: replicas, the step, homes, the pool."""
        # Step 1: replicas from history, then the step's micro-batches, which may be planned anew.
        homes_LRH = self._homes_LRH()
        for (_, group), replicas in self._replicas.items():
            replicas.before_step(iteration, homes_LRH[replicas.rows])
            replicas.after_step(iteration, counts_LGPRE[replicas.rows, group])
        # Step 2: homes, between this step and the next.
        if self._homes is not None:
            self._homes.between_steps(iteration, counts_LGPRE.sum(axis=(1, 2)))
        # Step 3: the pool, where the run had step times to judge by.
        self._recent.append(counts_LGPRE[:, 0])
        times = self._inputs.step_times.get(iteration)
        if self._pool is not None and times is not None:
            self._evaluate(self._pool, iteration, times)

    def _evaluate(self, pool: ReplayedPool, iteration: int, times: StepTimes) -> None:
        verdict = pool.evaluate(iteration, times, list(self._recent), self._homes_LRH())
        self._evaluations[iteration] = (verdict.setting.key, verdict.reason)
        if not verdict.switched:
            return
        if self._homes is not None:
            self._homes.switch_to(verdict.setting)
        homes_LRH = self._homes_LRH()
        for replicas in self._replicas.values():
            replicas.switch_to(verdict.setting, homes_LRH[replicas.rows])

    def _homes_LRH(self) -> IntArray:
        """Expert in each home slot of all layers; in logical order where homes do not move."""
        if self._homes is not None:
            return self._homes.controller.placement.homes_LRH
        sizes: dict[str, Any] = {"num_experts": self._start.num_experts, "num_ranks": self._start.num_ranks}
        return Placement.contiguous(num_layers=len(self._rows), **sizes).homes_LRH
