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

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
from megatron_smartmoe.runtime.replicas.slots import SpareSlots
from megatron_smartmoe.runtime.replicas.split import homes_only, segment_shifts, shifted_rows, split_tokens
from megatron_smartmoe.spec.arrays import IntArray

PlanReplicas = Callable[[IntArray], IntArray]  # counts [R, E] of one micro-batch to slots [R, S + K]
Listener = Callable[[IntArray, IntArray], None]  # counts [R, E], and what is sent [source rank, rank, slot]


class ReplicaDispatcher(SlotDispatcher):
    """Dispatches to home slots and spare slots.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        local_expert_indices: this rank's home slots, counted over the whole layer.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `tp_ep` are used.
        spare: this rank's spare slots.
        num_nodes: nodes that the expert-parallel group spans.
        fetch_early: whether the home weights are up to date when tokens are dispatched, and not only when the experts
            compute: then the replicas' weights are fetched during the dispatch.
        plan: plans the replicas of each micro-batch from its counts; None when `slots_RS` is set from outside.
        listener: called once for every training micro-batch.

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
        fetch_early: bool = True,
        plan: PlanReplicas | None = None,
        listener: Listener | None = None,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, counts_on_device=True)
        self._spare, self._num_nodes, self._fetch_early = spare, num_nodes, fetch_early
        self._plan, self._listener = plan, listener
        self._homes_RS = homes_only(self.num_experts, self.ep_size, spare.num_slots)
        self.slots_RS = self._homes_RS
        self._home_slots = num_local_experts
        self.num_local_experts = num_local_experts + spare.num_slots  # Megatron sorts what arrives by these
        # what arrives is one block of rows for each (source, slot); the experts need the order (slot, source)
        blocks_QS = torch.arange(self.tp_size * self.ep_size * self.num_local_experts).view(-1, self.num_local_experts)
        self.sort_input_by_local_experts = blocks_QS.T.ravel()
        self.restore_output_by_local_experts = blocks_QS.view(self.num_local_experts, -1).T.ravel()

    def plan_with(self, plan: PlanReplicas | None) -> None:
        """Drop the current replicas and use another planner from the next iteration on.

        Args:
            plan: see the constructor.
        """
        self._plan, self.slots_RS = plan, self._homes_RS
        self._spare.drop()

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Plan the replicas, split the tokens, and set the sizes of the all-to-all; see `SlotDispatcher`."""
        # Step 1: the counts of all ranks, and the replicas planned for their sum
        counts_PRE = self._gather_counts(tokens_E)
        slots_RS = self._choose_slots(counts_PRE.sum(axis=0))
        # Step 2: how many tokens each rank sends to each slot, [P, source rank, rank, slot]
        sent_PRRS = np.stack([split_tokens(each, slots_RS, self._home_slots, self._num_nodes) for each in counts_PRE])
        if self._listener is not None and self.training and torch.is_grad_enabled():  # recomputation counts once
            self._listener(counts_PRE.sum(axis=0), sent_PRRS.sum(axis=0))
        # Step 3: sizes for Megatron's exchange, and the rows of this rank moved to where they are sent from
        self._set_sizes(sent_PRRS)
        own_RS = sent_PRRS[self.tp_rank, self.ep_group.rank()]
        return shifted_rows(rows_TK, *segment_shifts(own_RS, slots_RS))

    def _gather_counts(self, tokens_E: torch.Tensor) -> IntArray:
        """Tokens per home slot of all ranks, `[P, R, E]`, on the host: the one synchronisation of the layer."""
        counts = tokens_E.new_empty(self.ep_size * self.tp_size * self.num_experts)
        dist.all_gather_into_tensor(counts, tokens_E, group=self.tp_ep_group)
        counts_RPE = counts.cpu().numpy().reshape(self.ep_size, self.tp_size, self.num_experts)
        return np.ascontiguousarray(counts_RPE.transpose(1, 0, 2))

    def _choose_slots(self, counts_RE: IntArray) -> IntArray:
        """The slots `[R, S + K]` that this micro-batch uses; starts to fetch the weights of its replicas."""
        if not self.training:
            return self._homes_RS
        if self._plan is not None:
            self.slots_RS = self._plan(counts_RE)
            used = self._spare.use(self.slots_RS, num_passes=1)
            if used is not None and self._fetch_early:
                used.start()
        return self.slots_RS

    def _set_sizes(self, sent_PRRS: IntArray) -> None:
        """Set the attributes that Megatron's exchange reads, all of them on the host."""
        rank = self.ep_group.rank()
        arriving_PRS = sent_PRRS[:, :, rank]  # here, from each source rank of each expert-tensor rank
        leaving_RS = sent_PRRS[self.tp_rank, rank]
        self.num_out_tokens = int(leaving_RS.sum())
        self.input_splits = leaving_RS.sum(axis=1).tolist()
        self.output_splits = arriving_PRS[self.tp_rank].sum(axis=1).tolist()
        self.output_splits_tp = torch.from_numpy(arriving_PRS.sum(axis=(1, 2)))
        self.num_global_tokens_per_local_expert = torch.from_numpy(arriving_PRS.reshape(-1, arriving_PRS.shape[2]))
        tokens_S = torch.from_numpy(arriving_PRS.sum(axis=(0, 1)))
        with_replicas = self.training and self._spare.in_use is not None
        self.tokens_per_expert = self._tokens_on_device_S = tokens_S if with_replicas else tokens_S[: self._home_slots]

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        """Return the counts as they are: they are on the host already."""
        assert tokens_per_expert is not None
        return tokens_per_expert
