"""LayerPlanner: the replicas of one layer and the split of each micro-batch over them, whatever dispatches the tokens.

It holds what changes from one micro-batch to the next: the slot table, how it is planned, the spare slots, and who
listens to the loads. A dispatcher passes it this rank's tokens of each expert and gets the plan of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_smartmoe.placement.replan import ReplanOptions
from megatron_smartmoe.runtime.replicas.device_plan import DevicePlanner
from megatron_smartmoe.runtime.replicas.dispatch_plan import (
    DispatchPlan,
    DispatchPlanner,
    ExactOptions,
    RankView,
    plan_or_replan,
)
from megatron_smartmoe.runtime.replicas.slots import ReplicasInUse, SpareSlots
from megatron_smartmoe.runtime.replicas.split import homes_only
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.runtime.replicas.wire import ReplicaWire
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part

Listener = Callable[[MicroBatch], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class StartedPlan:
    """A plan of which the host has read nothing yet.

    Attributes:
        awaited: what the host will read: the counts of all ranks, or the numbers of a plan that was made where they
            are.
        segments_3C: of such a plan, this rank's segments; see `DevicePlanner.start`. None where the host plans.
    """

    awaited: torch.Tensor
    segments_3C: torch.Tensor | None


class LayerPlanner:
    """Plans the micro-batches of one layer on one rank.

    Args:
        view: the expert-parallel group and this rank.
        counts_group: the ranks that gather their counts: those of `view`, and those that share their experts.
        spare: this rank's spare slots.
        exact: how replicas are planned from the counts of a micro-batch; None when `slots_RS`, which is set from
            outside, always serves.
        on_device: whether they are planned where the counts are; see `device_plan`.
        falls_short: when they are, if `slots_RS` is set from outside all the same; None for in every micro-batch.
        listener: called once for every training micro-batch.
        begins: called when the layer begins to dispatch in training; home weights are up to date when it returns.
            Megatron's schedule of two micro-batches skips the layer's forward hooks.
        ends: called when its results are combined in training.

    Attributes:
        slots_RS: expert in each slot, `[R, S + K]`, home slots first; experts are numbered by their home.
        training: whether replicas are used; set by the layer. In evaluation their weights would be stale.
    """

    training = True

    def __init__(
        self,
        view: RankView,
        counts_group: dist.ProcessGroup,
        *,
        spare: SpareSlots,
        exact: ExactOptions | None = None,
        on_device: bool = False,
        falls_short: ReplanOptions | None = None,
        listener: Listener | None = None,
        begins: Callable[[], None] | None = None,
        ends: Callable[[], None] | None = None,
    ) -> None:
        self.view, self._group, self._spare = view, counts_group, spare
        self._exact, self._falls_short, self._listener = exact, falls_short, listener
        self._begins, self._ends = begins, ends
        self._starting: ReplicasInUse | None = None  # replicas of a micro-batch, until their fetch has started
        self._homes_RS = homes_only(view.num_experts, view.num_ranks, spare.num_slots)
        self.slots_RS = self._homes_RS
        on_gpu = spare.device.type == "cuda"
        # a plan lies in its planner's memory until the next one; `auto` chooses between two
        self._planner, self._planner_anew = (DispatchPlanner(view, pinned=on_gpu) for _ in range(2))
        self._device_planner = DevicePlanner(view, pinned=on_gpu) if on_device else None

    def plan_with(self, exact: ExactOptions | None, falls_short: ReplanOptions | None = None) -> None:
        """Drop the current replicas and plan in another way from the next iteration on.

        Args:
            exact: see the constructor.
            falls_short: see the constructor.
        """
        self._exact, self._falls_short, self.slots_RS = exact, falls_short, self._homes_RS
        self._spare.drop()

    @property
    def wire(self) -> ReplicaWire:
        """What carries the replicas of this layer."""
        return self._spare.wire

    def begin(self) -> None:
        """To be called before the tokens of a micro-batch are dispatched."""
        if self.training and self._begins is not None:
            self._begins()

    def end(self) -> None:
        """To be called when the results of a micro-batch are combined."""
        if self.training and self._ends is not None:
            self._ends()

    @property
    def plans_on_device(self) -> bool:
        """Whether replicas are planned where the counts are."""
        return self._device_planner is not None

    @property
    def uses_replicas(self) -> bool:
        """Whether any rank has a replica in the micro-batch that was planned last."""
        return self.training and self._spare.in_use is not None

    def plan(self, tokens_E: torch.Tensor) -> DispatchPlan:
        """The plan of one micro-batch; starts to fetch the weights of replicas that are planned for it.

        All ranks of the group call it; the host waits for their counts.

        Args:
            tokens_E: this rank's tokens of each expert, by home slot, int64.
        """
        return self.finish(self.start(tokens_E))

    def start(self, tokens_E: torch.Tensor) -> StartedPlan:
        """The half of `plan` that a CUDA graph can hold: the host waits for nothing, and no shape depends on a count.

        All ranks of the group call it.

        Args:
            tokens_E: see `plan`.
        """
        view = self.view
        counts = tokens_E.new_empty(view.num_ranks * view.tp_size * view.num_experts)
        dist.all_gather_into_tensor(counts, tokens_E, group=self._group)
        if self.training and self._device_planner is not None and self._exact is not None:
            with STEP_CLOCK.within(Part.PLANNING):
                numbers, segments_3C = self._device_planner.start(counts, self._exact)
            return StartedPlan(awaited=numbers, segments_3C=segments_3C)
        return StartedPlan(awaited=counts, segments_3C=None)

    def finish(self, started: StartedPlan) -> DispatchPlan:
        """The other half of `plan`: the host waits for what `start` has left, and the fetch starts."""
        if started.segments_3C is None:
            plan = self._plan(self._planner.to_host(started.awaited))
        else:
            plan = self._read(started.awaited, started.segments_3C)
        if self._listener is not None and self.training and torch.is_grad_enabled():  # recomputation counts once
            self._listener(plan.load)
        return plan

    @STEP_CLOCK.within(Part.PLANNING)
    def _read(self, numbers: torch.Tensor, segments_3C: torch.Tensor) -> DispatchPlan:
        """The plan that was made where the counts are."""
        assert self._device_planner is not None
        return self._used(self._device_planner.read(numbers, segments_3C))

    @STEP_CLOCK.within(Part.PLANNING)
    def _plan(self, counts_RPE: torch.Tensor) -> DispatchPlan:
        """The plan for counts `[R, P, E]` on the host."""
        if not self.training:
            return self._planner.plan(counts_RPE, self._homes_RS)
        if self._exact is not None and self._falls_short is not None:
            return self._plan_where_short(counts_RPE, self._exact, self._falls_short)
        plan = self._planner.plan(counts_RPE, self.slots_RS, self._exact)
        return plan if self._exact is None else self._used(plan)

    def _used(self, plan: DispatchPlan) -> DispatchPlan:
        """The same plan; its replicas, planned for one micro-batch, are used from now on."""
        self.slots_RS = plan.slots_RS
        self._start(self._spare.use(self.slots_RS, num_passes=1, takes_part=bool(plan.own_replicas)))
        return plan

    def _plan_where_short(self, counts_RPE: torch.Tensor, exact: ExactOptions, rule: ReplanOptions) -> DispatchPlan:
        """The plan with the replicas in `slots_RS`, or one with replicas planned anew, as the rule of `auto` has it."""
        plan = plan_or_replan((self._planner, self._planner_anew), counts_RPE, self.slots_RS, exact, rule)
        if plan.load.replanned_RS is not None:
            self._start(self._spare.use_once(plan.slots_RS, takes_part=bool(plan.own_replicas)))
        return plan

    def _start(self, used: ReplicasInUse | None) -> None:
        """Start to fetch replicas that are planned for a micro-batch."""
        self._starting = used
        if self._spare.device.type != "cuda":  # on a GPU, the host looks for its messages while the device permutes
            self.start_fetch()

    def start_fetch(self) -> None:
        """Start the fetch that the plan of this micro-batch has left to start, if there is one."""
        used, self._starting = self._starting, None
        if used is not None:
            used.start()
