"""The three loops of training as a replay runs them: the same planners, fed from a trace, moving nothing.

Whatever decides is what training calls: `Controller` with `HomesPlanner`, `ReplicaPlanner`, `DispatchPlanner`,
`Switchboard`. Only what surrounds it is replaced: counts come from the trace, step times from `pool.jsonl`, a migration
succeeds or fails as the log says that it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_smartmoe.placement.decisions import Decision, digest_of
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.layer_cost import layer_seconds
from megatron_smartmoe.placement.replan import ReplanOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.controller import Controller, Moved, with_outcome
from megatron_smartmoe.runtime.counts import CountsShape, ExpertCounts, IntervalCounts
from megatron_smartmoe.runtime.decisions.record import HomesStart, PoolStart, Start
from megatron_smartmoe.runtime.pool.prediction import PoolLoad, moe_seconds
from megatron_smartmoe.runtime.pool.switchboard import PoolVerdict, StepTimes, Switchboard, pool_decision
from megatron_smartmoe.runtime.replicas.dispatch_plan import (
    DispatchPlanner,
    ExactOptions,
    RankView,
    by_home,
    plan_or_replan,
)
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.runtime.replicas.replans import replans_of
from megatron_smartmoe.runtime.replicas.split import BALANCED
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement, SlotChange, with_empty_slots

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class FailedMove:
    """A migration that failed: why, and the slots that it has changed all the same."""

    failure: str
    reached: tuple[SlotChange, ...]


class ReplayedHomes:
    """The homes loop, after `HomesLoop` of training.

    Args:
        start: its settings.
        state: what it had at the start, its placement among it.
        shape: sizes.
        failed: migrations that failed, by iteration.
    """

    def __init__(self, start: HomesStart, state: State, shape: Start, failed: Mapping[int, FailedMove]) -> None:
        self.decisions: list[Decision] = []
        self._pricing, self._failed, self._iteration = start.pricing, failed, 0
        placement = Placement(slots_LRS=state["slots_LRS"].astype(np.int64), num_experts=shape.num_experts)
        self._counts = _TraceCounts(shape, start.options.windows)
        planner = HomesPlanner(
            placement.num_layers, shape.num_experts, start.online, layer_seconds(start.pricing, start.mode)
        )
        self.controller = Controller(start.options, planner, self._counts, self, self, placement)
        self.controller.restore(state, adds_sums=True)

    def between_steps(self, iteration: int, counts_LRE: IntArray) -> None:
        """Add the counts of an iteration, over all groups and micro-batches, and decide when the interval is over."""
        self._iteration, self._counts.next_LRE = iteration, torch.from_numpy(counts_LRE)
        self.controller.step(iteration)

    def switch_to(self, setting: PoolSetting) -> None:
        """Follow a switch of the pool."""
        self.controller.switch_to(setting, layer_seconds(self._pricing, setting.replicas))

    def move(self, before: Placement, after: Placement) -> Moved:
        """See `runtime.controller.Mover`: moves nothing, and fails where the run's migration failed."""
        failed = self._failed.get(self._iteration)
        if failed is None:
            return Moved(placement=after)
        slots_LRS = before.slots_LRS.copy()
        for change in failed.reached:
            slots_LRS[change.layer, change.rank, change.slot] = change.after
        placement = replace(before, slots_LRS=slots_LRS)
        return Moved(placement=placement, failure=failed.failure, reached=failed.reached)

    def decided(self, decision: Decision, before: float, after: float, moved: Moved | None) -> None:
        """See `runtime.controller.Reporter`."""
        self.decisions.append(decision if moved is None else with_outcome(decision, moved))

    def warn(self, iteration: int, text: str) -> None:
        """See `runtime.controller.Reporter`: a run's warning is no decision."""


class _TraceCounts(IntervalCounts):
    """Counts of an interval, of all ranks at once: an iteration's are `next_LRE`."""

    def __init__(self, shape: Start, windows: int) -> None:
        rows = tuple(range(len(shape.layers)))
        counts = ExpertCounts(len(rows), shape.num_experts, "cpu")
        super().__init__(counts, CountsShape(rows=rows, num_ranks=shape.num_ranks, ep_rank=0, windows=windows))
        self.next_LRE = torch.zeros(0)

    def end_iteration(self, window: int) -> None:
        """Add the iteration's counts to a window of the interval."""
        self._sums_WLRE[window] += self.next_LRE
        self._iterations_W[window] += 1


class ReplayedReplicas:
    """The replicas loop of one group of one pipeline stage, after `ReplicaLoop` of training.

    Args:
        start: sizes and settings, those of the replicas among them.
        stage: number of the stage.
        group: number of the expert-parallel group.
        state: what it had at the start.
    """

    def __init__(self, start: Start, stage: int, group: int, state: State) -> None:
        assert start.replicas is not None
        self.decisions: list[Decision] = []
        self._start, self._settings, self._group = start, start.replicas, group
        layers = start.stages[stage]
        self.rows = [start.layers.index(number) for number in layers.layers]
        self._passes = layers.passes
        self._mode, self._used_slots = start.replicas.mode, start.replicas.used_slots
        empty = Placement.contiguous(
            num_layers=len(self.rows),
            num_experts=start.num_experts,
            num_ranks=start.num_ranks,
            spare_slots=self._used_slots,
        )
        self._planner = ReplicaPlanner(
            empty, group, start.replicas.online, fastest_kernels(), layers.layers, layers.passes
        )
        self._planner.restore(state)
        home_slots = start.num_experts // start.num_ranks
        view = RankView(
            num_ranks=start.num_ranks,
            tp_size=1,
            num_experts=start.num_experts,
            num_slots=home_slots + start.spare_slots,
            num_nodes=start.replicas.num_nodes,
            rank=0,
            tp_rank=0,
        )
        self._dispatchers = (DispatchPlanner(view), DispatchPlanner(view))

    def before_step(self, iteration: int, homes_LRH: IntArray) -> None:
        """Plan the iteration's replicas.

        Args:
            iteration: its number.
            homes_LRH: expert in each home slot of this stage's layers.
        """
        if not np.array_equal(homes_LRH, self._planner.placement.homes_LRH):
            self._planner.rehome(self._placement(homes_LRH))
        if self._mode not in ("history", "auto"):
            return
        decision = self._planner.plan(iteration)
        if decision is not None:
            self.decisions.append(decision)

    def after_step(self, iteration: int, counts_LPRE: IntArray) -> None:
        """Plan anew where `auto` does, and remember what was routed.

        Args:
            iteration: its number.
            counts_LPRE: counts of every pass through this stage's layers, by source rank of the group.
        """
        if self._mode == "auto":
            records = [self._dispatched(layer, counts_PRE) for layer, counts_PRE in enumerate(counts_LPRE)]
            placement = self._planner.placement
            price = self._settings.exact_price
            decision = replans_of(iteration, self._group, placement, records, used_slots=self._used_slots, price=price)
            if decision is not None:
                self.decisions.append(decision)
        micro_batches = self._start.micro_batches
        load_LPE = counts_LPRE.sum(axis=2)
        load_LME = [
            load_PE[: micro_batches * passes].reshape(micro_batches, passes, -1).sum(axis=1)
            for load_PE, passes in zip(load_LPE, self._passes, strict=True)
        ]
        self._planner.observe(np.stack(load_LME))

    def switch_to(self, setting: PoolSetting, homes_LRH: IntArray) -> None:
        """Follow a switch of the pool."""
        self._mode, self._used_slots = setting.replicas, setting.spare_slots
        self._planner.switch_to(self._mode, self._placement(homes_LRH))

    def _placement(self, homes_LRH: IntArray) -> Placement:
        return Placement(slots_LRS=with_empty_slots(homes_LRH, self._used_slots), num_experts=self._start.num_experts)

    def _dispatched(self, layer: int, counts_PRE: IntArray) -> list[MicroBatch]:
        """The micro-batches of a layer as its dispatcher planned them, experts numbered by their home."""
        settings, placement = self._settings, self._planner.placement
        price = settings.exact_price
        exact = ExactOptions(
            used_slots=self._used_slots,
            num_nodes=settings.scope_nodes,
            or_group=settings.online.replica.or_group,
            price=price,
        )
        rule = ReplanOptions(limit=BALANCED, price=price)
        unused = self._start.spare_slots - self._used_slots
        slots_RS = with_empty_slots(by_home(placement.slots_LRS[layer], placement.home_slots), unused)
        counts_PRE = counts_PRE[:, :, placement.homes_LRH[layer].ravel()]
        found = []
        for counts_RE in counts_PRE:
            counts_RPE = torch.from_numpy(np.ascontiguousarray(counts_RE))[:, None]
            found.append(plan_or_replan(self._dispatchers, counts_RPE, slots_RS, exact, rule).load)
        return found


class ReplayedPool:
    """The pool, after `PoolLoop` of training.

    Args:
        start: its settings.
        shape: sizes.
    """

    def __init__(self, start: PoolStart, shape: Start) -> None:
        self.decisions: list[Decision] = []
        self._start, self._shape = start, shape
        self._board = Switchboard(start.now, shape.iteration, start.options)

    def evaluate(
        self, iteration: int, times: StepTimes, recent: Sequence[IntArray], homes_LRH: IntArray
    ) -> PoolVerdict:
        """Re-evaluate the settings.

        Args:
            iteration: the iteration that has ended.
            times: the step times that were measured.
            recent: counts `[L, P, R, E]` of the first group in the latest iterations, the latest last.
            homes_LRH: expert in each home slot of all layers.
        """
        start, sample = self._start, list(self._start.sample)
        sampled = [counts_LPRE[sample] for counts_LPRE in recent[-start.iterations :]]
        batches_LPRE = sampled[-1][:, : start.micro_batches]
        totals_ILE = np.stack([counts_LPRE.sum(axis=(1, 2)) for counts_LPRE in sampled])
        totals_ILE, batches_BLRE = (
            np.rint(counts / self._shape.expert_shares).astype(np.int64)
            for counts in (totals_ILE, batches_LPRE.swapaxes(0, 1))
        )
        load = PoolLoad(totals_ILE=totals_ILE, batches_BLRE=batches_BLRE, homes_LRH=homes_LRH[sample])
        verdict = self._board.evaluate(iteration, times, lambda: moe_seconds(start.settings, load, start.prices))
        if verdict.is_decision:
            self.decisions.append(pool_decision(iteration, verdict, digest_of(totals_ILE, batches_BLRE)))
        return verdict
