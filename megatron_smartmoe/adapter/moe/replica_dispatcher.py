"""ReplicaDispatcher: an expert's tokens are split over its home and its replicas by the counts of this micro-batch.

Megatron's dropless dispatch gathers the counts of all ranks and brings sums of them to the host. Here the counts come
to the host whole and a little earlier, before the permutation: the one synchronisation is moved, none is added. From
them every rank computes the same split (see `runtime.replicas.split`); the rows that a rank receives are sorted by its
home slots first and its spare slots after them. Megatron's own dispatchers split tokens in another way, before they
see them: `physical_slots`.

A CUDA graph of the preprocessing holds all of it where the plan is made where the counts are: the host reads the plan
behind the graph. Where the host plans, the graph ends with the counts of all ranks, and rows are permuted behind it.

With expert tensor parallelism the P ranks that share an expert route different tokens: their counts have an axis P in
front. Each sends its tokens to the ranks of its own expert-parallel group, and the ranks that share an expert gather
them from each other. So they must all have the same replicas, planned for the sum of their counts, while each splits
its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
from megatron_smartmoe.adapter.moe.replica_steps import LEFT_BY_GRAPH, ReplicaSteps
from megatron_smartmoe.runtime.replicas.dispatch_plan import DispatchPlan
from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner
from megatron_smartmoe.runtime.replicas.split import shifted_rows


class ReplicaDispatcher(ReplicaSteps, SlotDispatcher):
    """Dispatches to home slots and spare slots.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        local_expert_indices: this rank's home slots, counted over the whole layer.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `tp_ep` are used.
        planner: plans each micro-batch.
        in_blocks: whether the experts take the rows of home slots and of spare slots apart.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        planner: LayerPlanner,
        in_blocks: bool,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, counts_on_device=True)
        self.planner, self._in_blocks = planner, in_blocks
        self.cudagraph_attrs = ["probs", *LEFT_BY_GRAPH]  # Megatron's others are set on the host, behind the graph
        self._home_slots = num_local_experts
        self.num_local_experts = planner.view.num_slots  # Megatron sorts what arrives by these
        # what arrives is one block of rows for each (source, slot); the experts need the order (slot, source)
        blocks_QS = torch.arange(self.tp_size * self.ep_size * self.num_local_experts).view(-1, self.num_local_experts)
        self.sort_input_by_local_experts = blocks_QS.T.ravel()
        self.restore_output_by_local_experts = blocks_QS.view(self.num_local_experts, -1).T.ravel()

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Plan the replicas, split the tokens, and set the sizes of the all-to-all; see `SlotDispatcher`."""
        if self.is_graphed:
            return self._start_splits(rows_TK, tokens_E)
        # Step 1: the counts of all ranks, and the plan that follows from them
        plan = self.planner.plan(tokens_E)
        # Step 2: sizes for Megatron's exchange, and the rows of this rank moved to where they are sent from
        self._set_sizes(plan)
        return shifted_rows(rows_TK, plan.segments_2N, plan.num_rows)

    def _start_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """What of the split a CUDA graph can hold; Megatron forbids such graphs where capacity drops choices."""
        started = self.planner.start(tokens_E)
        self.keep_started(started)
        self.num_out_tokens = rows_TK.numel()
        if started.segments_3C is None:
            return rows_TK
        return shifted_rows(rows_TK, started.segments_3C[:2], rows_TK.numel())

    @property
    def _permutes_in_graph(self) -> bool:
        return self.is_graphed and self.planner.plans_on_device

    def _permuted(self, tokens_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SlotDispatcher`; tokens and weights as they are where a graph ends before the plan."""
        if self.is_graphed and self.segments_3C is None:
            return tokens_TH, weights_TK
        return super()._permuted(tokens_TH, weights_TK)

    def after_plan(
        self, plan: DispatchPlan, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ReplicaSteps`: the sizes of the exchange, and the permutation where a graph does not hold it."""
        self._set_sizes(plan)
        if self.segments_3C is not None:
            return hidden_states, probs
        self.rows_TK = shifted_rows(self.rows_TK, plan.segments_2N, plan.num_rows)
        return super()._permuted(hidden_states, probs)

    def _set_sizes(self, plan: DispatchPlan) -> None:
        """Set the attributes that Megatron's exchange reads, all of them on the host."""
        self.num_out_tokens = plan.num_rows
        self.input_splits, self.output_splits = plan.sent_R, plan.received_R
        self.output_splits_tp = plan.arriving_P
        self.num_global_tokens_per_local_expert = plan.arriving_PRS.flatten(0, 1)
        tokens_S = plan.tokens_S if self.planner.uses_replicas else plan.tokens_S[: self._home_slots]
        self.tokens_per_expert = self._tokens_on_device_S = tokens_S

    def home_rows(self, tokens_S: torch.Tensor) -> int | None:
        """See `SlotDispatcher`; where gradients are not packed, both kinds of rows take one way."""
        has_spare_rows = len(tokens_S) > self._home_slots
        return int(tokens_S[: self._home_slots].sum()) if has_spare_rows and self._in_blocks and self.packs else None

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> Any:
        """Return the counts as they are: they are on the host already, or there are none before the plan."""
        return tokens_per_expert
