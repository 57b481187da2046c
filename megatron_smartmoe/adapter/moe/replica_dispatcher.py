"""ReplicaDispatcher: an expert's tokens are split over its home and its replicas by the counts of this micro-batch.

Megatron's dropless dispatch gathers the counts of all ranks and brings sums of them to the host. Here the counts come
to the host whole and a little earlier, before the permutation: the one synchronisation is moved, none is added. From
them every rank computes the same split (see `runtime.replicas.split`); the rows that a rank receives are sorted by its
home slots first and its spare slots after them.

With expert tensor parallelism the P ranks that share an expert route different tokens: their counts have an axis P in
front. Each sends its tokens to the ranks of its own expert-parallel group, and the ranks that share an expert gather
them from each other. So they must all have the same replicas, planned for the sum of their counts, while each splits
its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
from megatron_smartmoe.placement.replan import ReplanOptions, planned_anew
from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan, DispatchPlanner, ExactOptions, RankView
from megatron_smartmoe.runtime.replicas.slots import ReplicasInUse, SpareSlots
from megatron_smartmoe.runtime.replicas.split import homes_only, shifted_rows
from megatron_smartmoe.runtime.replicas.tally import MicroBatch
from megatron_smartmoe.runtime.replicas.wire import advancing

Listener = Callable[[MicroBatch], None]


class ReplicaDispatcher(SlotDispatcher):
    """Dispatches to home slots and spare slots.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        local_expert_indices: this rank's home slots, counted over the whole layer.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `tp_ep` are used.
        spare: this rank's spare slots.
        num_nodes: nodes that the expert-parallel group spans.
        exact: how replicas are planned from the counts of a micro-batch; None when `slots_RS`, which is set from
            outside, always serves.
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
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        spare: SpareSlots,
        num_nodes: int = 1,
        exact: ExactOptions | None = None,
        falls_short: ReplanOptions | None = None,
        listener: Listener | None = None,
        begins: Callable[[], None] | None = None,
        ends: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, counts_on_device=True)
        self._spare = spare
        self._exact, self._falls_short, self._listener = exact, falls_short, listener
        self._begins, self._ends = begins, ends
        self._starting: ReplicasInUse | None = None  # replicas of a micro-batch, until their fetch has started
        self._homes_RS = homes_only(self.num_experts, self.ep_size, spare.num_slots)
        self.slots_RS = self._homes_RS
        self._home_slots = num_local_experts
        self.num_local_experts = num_local_experts + spare.num_slots  # Megatron sorts what arrives by these
        view = RankView(
            num_ranks=self.ep_size,
            tp_size=self.tp_size,
            num_experts=self.num_experts,
            num_slots=self.num_local_experts,
            num_nodes=num_nodes,
            rank=self.ep_group.rank(),
            tp_rank=self.tp_rank,
        )
        on_gpu = spare.device.type == "cuda"
        # a plan lies in its planner's memory until the next one; `auto` chooses between two
        self._planner, self._planner_anew = (DispatchPlanner(view, pinned=on_gpu) for _ in range(2))
        # what arrives is one block of rows for each (source, slot); the experts need the order (slot, source)
        blocks_QS = torch.arange(self.tp_size * self.ep_size * self.num_local_experts).view(-1, self.num_local_experts)
        self.sort_input_by_local_experts = blocks_QS.T.ravel()
        self.restore_output_by_local_experts = blocks_QS.view(self.num_local_experts, -1).T.ravel()

    def plan_with(self, exact: ExactOptions | None, falls_short: ReplanOptions | None = None) -> None:
        """Drop the current replicas and plan in another way from the next iteration on.

        Args:
            exact: see the constructor.
            falls_short: see the constructor.
        """
        self._exact, self._falls_short, self.slots_RS = exact, falls_short, self._homes_RS
        self._spare.drop()

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort this rank's tokens by slot; see `SlotDispatcher`."""
        if self.training and self._begins is not None:
            self._begins()
        rows = super().dispatch_preprocess(advancing(hidden_states, self._spare.wire), routing_map, probs)
        self._start_fetch()
        self._spare.wire.advance()  # behind the permutation
        return rows

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort what has arrived by slot; see `SlotDispatcher`."""
        self._spare.wire.advance()  # behind the all-to-all
        return super().dispatch_postprocess(global_input_tokens, global_probs)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Add up each token's results; see `SlotDispatcher`."""
        output = advancing(super().combine_postprocess(permutated_local_input_tokens), self._spare.wire)
        if self.training and self._ends is not None:
            self._ends()
        return output

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Plan the replicas, split the tokens, and set the sizes of the all-to-all; see `SlotDispatcher`."""
        # Step 1: the counts of all ranks, and the plan that follows from them
        plan = self._plan_dispatch(self._gather_counts(tokens_E))
        if self._listener is not None and self.training and torch.is_grad_enabled():  # recomputation counts once
            self._listener(plan.load)
        # Step 2: sizes for Megatron's exchange, and the rows of this rank moved to where they are sent from
        self._set_sizes(plan)
        return shifted_rows(rows_TK, plan.segments_2N, plan.num_rows)

    def _gather_counts(self, tokens_E: torch.Tensor) -> torch.Tensor:
        """Tokens per home slot of all ranks, `[R, P, E]`, on the host: the one synchronisation of the layer."""
        counts = tokens_E.new_empty(self.ep_size * self.tp_size * self.num_experts)
        dist.all_gather_into_tensor(counts, tokens_E, group=self.tp_ep_group)
        return self._planner.to_host(counts)

    def _plan_dispatch(self, counts_RPE: torch.Tensor) -> DispatchPlan:
        """The plan of this micro-batch; starts to fetch the weights of replicas that are planned for it."""
        if not self.training:
            return self._planner.plan(counts_RPE, self._homes_RS)
        if self._exact is not None and self._falls_short is not None:
            return self._plan_where_short(counts_RPE, self._exact, self._falls_short)
        plan = self._planner.plan(counts_RPE, self.slots_RS, self._exact)
        if self._exact is not None:
            self.slots_RS = plan.slots_RS
            self._start(self._spare.use(self.slots_RS, num_passes=1, takes_part=bool(plan.own_replicas)))
        return plan

    def _plan_where_short(self, counts_RPE: torch.Tensor, exact: ExactOptions, rule: ReplanOptions) -> DispatchPlan:
        """The plan with the replicas in `slots_RS`, or one with replicas planned anew, as the rule of `auto` has it."""
        kept = self._planner.plan(counts_RPE, self.slots_RS)
        anew = planned_anew(
            kept.busiest,
            kept.load.load_E,
            self.ep_size,
            rule,
            lambda: self._planner_anew.plan(counts_RPE, self._homes_RS, exact),
        )
        if anew is None:
            return kept
        self._start(self._spare.use_once(anew.slots_RS, takes_part=bool(anew.own_replicas)))
        return replace(anew, load=replace(anew.load, replanned_RS=anew.slots_RS))

    def _start(self, used: ReplicasInUse | None) -> None:
        """Start to fetch replicas that are planned for a micro-batch."""
        self._starting = used
        if self._spare.device.type != "cuda":  # on a GPU, the host looks for its messages while the device permutes
            self._start_fetch()

    def _start_fetch(self) -> None:
        """Start the fetch that is to start, if there is one."""
        used, self._starting = self._starting, None
        if used is not None:
            used.start()

    def _set_sizes(self, plan: DispatchPlan) -> None:
        """Set the attributes that Megatron's exchange reads, all of them on the host."""
        self.num_out_tokens = plan.num_rows
        self.input_splits, self.output_splits = plan.sent_R, plan.received_R
        self.output_splits_tp = plan.arriving_P
        self.num_global_tokens_per_local_expert = plan.arriving_PRS.flatten(0, 1)
        with_replicas = self.training and self._spare.in_use is not None
        tokens_S = plan.tokens_S if with_replicas else plan.tokens_S[: self._home_slots]
        self.tokens_per_expert = self._tokens_on_device_S = tokens_S

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        """Return the counts as they are: they are on the host already."""
        assert tokens_per_expert is not None
        return tokens_per_expert
