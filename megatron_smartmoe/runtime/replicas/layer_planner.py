"""LayerPlanner: the replicas of one layer and the split of each micro-batch over them, whatever dispatches the tokens.

It holds what changes from one micro-batch to the next: the slot table, how it is planned, the spare slots, and who
listens to the loads. A dispatcher passes it this rank's tokens of each expert and gets the plan of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan, DispatchPlanner, ExactOptions, RankView
from megatron_smartmoe.runtime.replicas.slots import SpareSlots
from megatron_smartmoe.runtime.replicas.split import homes_only
from megatron_smartmoe.runtime.replicas.tally import MicroBatch

Listener = Callable[[MicroBatch], None]


class LayerPlanner:
    """Plans the micro-batches of one layer on one rank.

    Args:
        view: the expert-parallel group and this rank.
        counts_group: the ranks that gather their counts: those of `view`, and those that share their experts.
        spare: this rank's spare slots.
        fetch_early: whether the home weights are up to date when tokens are dispatched, and not only when the experts
            compute: then the replicas' weights are fetched during the dispatch.
        exact: how the replicas of each micro-batch are planned from its counts; None when `slots_RS` is set from
            outside.
        listener: called once for every training micro-batch.

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
        fetch_early: bool = True,
        exact: ExactOptions | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.view, self._group, self._spare = view, counts_group, spare
        self._fetch_early, self._exact, self._listener = fetch_early, exact, listener
        self._homes_RS = homes_only(view.num_experts, view.num_ranks, spare.num_slots)
        self.slots_RS = self._homes_RS
        self._planner = DispatchPlanner(view, pinned=spare.device.type == "cuda")

    def plan_with(self, exact: ExactOptions | None) -> None:
        """Drop the current replicas and plan in another way from the next iteration on.

        Args:
            exact: see the constructor.
        """
        self._exact, self.slots_RS = exact, self._homes_RS
        self._spare.drop()

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
        plan = self._plan(self._gather(tokens_E))
        if self._listener is not None and self.training and torch.is_grad_enabled():  # recomputation counts once
            self._listener(plan.load)
        return plan

    def _gather(self, tokens_E: torch.Tensor) -> torch.Tensor:
        """Tokens per home slot of all ranks, `[R, P, E]`, on the host."""
        view = self.view
        counts = tokens_E.new_empty(view.num_ranks * view.tp_size * view.num_experts)
        dist.all_gather_into_tensor(counts, tokens_E, group=self._group)
        return self._planner.to_host(counts)

    def _plan(self, counts_RPE: torch.Tensor) -> DispatchPlan:
        if not self.training:
            return self._planner.plan(counts_RPE, self._homes_RS)
        plan = self._planner.plan(counts_RPE, self.slots_RS, self._exact)
        if self._exact is not None:
            self.slots_RS = plan.slots_RS
            used = self._spare.use(self.slots_RS, num_passes=1, own=plan.own_replicas)
            if used is not None and self._fetch_early:
                used.start()
        return plan
