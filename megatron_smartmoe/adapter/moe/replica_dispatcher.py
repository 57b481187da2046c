"""ReplicaDispatcher: tokens go to copies of experts, split exactly by the counts of this micro-batch.

Megatron's dropless dispatch gathers the counts of all ranks and brings sums of them to the host. Here the counts come
to the host whole and a little earlier, before the permutation: the one synchronisation is moved, none is added. From
them every rank computes the same split (see `runtime.replicas.split`); the rows that a rank receives are sorted by its
home slots first and its spare slots after them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher, chosen_experts
from megatron_smartmoe.ops import dispatch_map, permute
from megatron_smartmoe.runtime.replicas.slots import SpareSlots
from megatron_smartmoe.runtime.replicas.split import homes_only, segment_shifts, shifted_rows, split_tokens
from megatron_smartmoe.spec.arrays import IntArray

Planner = Callable[[IntArray], IntArray]
Listener = Callable[[IntArray, IntArray], None]
# With expert tensor parallelism the ranks that share an expert route tokens of their own: an axis P in front, T in
# Megatron's words. Each sends its tokens to the ranks of its own expert-parallel group, and those gather them from
# each other. So all must have the same copies, planned for the sum, while each may split its tokens for itself.


class ReplicaDispatcher(SlotDispatcher):
    """Dispatches to home slots and spare slots.

    Args:
        num_local_experts: S, home slots of this rank.
        local_expert_indices: the home slots of this rank.
        config: of the transformer.
        pg_collection: with the groups `ep`, `expt_tp` and `tp_ep`.
        spare: the spare slots of this rank.
        num_nodes: nodes that the expert-parallel group lies on.
        fetch_early: whether the home weights are up to date when tokens are dispatched, not only when experts compute.
        plan: from counts `[R, E]` to slots `[R, S + K]` with copies for this micro-batch; None when they are set from
            outside, through `slots_RS`.
        listener: told the counts `[R, E]` of every training micro-batch and what was sent, `[source, rank, slot]`.

    Attributes:
        slots_RS: expert in each slot, by its home; homes first.
        training: whether copies serve; the layer's. In evaluation they would be stale.
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
        plan: Planner | None = None,
        listener: Listener | None = None,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, counts_on_device=True)
        self._spare, self._num_nodes, self._fetch_early = spare, num_nodes, fetch_early
        self._plan, self._listener = plan, listener
        self._homes_RS = homes_only(self.num_experts, self.ep_size, spare.num_slots)
        self.slots_RS = self._homes_RS
        self._home_slots = num_local_experts
        self.num_local_experts = num_local_experts + spare.num_slots  # Megatron sorts what arrives by these
        chunks = torch.arange(self.tp_size * self.ep_size * self.num_local_experts).view(-1, self.num_local_experts)
        self.sort_input_by_local_experts = chunks.T.ravel()
        self.restore_output_by_local_experts = chunks.view(self.num_local_experts, -1).T.ravel()

    def plan_with(self, plan: Planner | None) -> None:
        """Plan copies another way from the next iteration on, and drop those that serve now.

        Args:
            plan: as for the constructor.
        """
        self._plan, self.slots_RS = plan, self._homes_RS
        self._spare.in_use = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort this rank's tokens by the slots that they go to; see `SlotDispatcher`."""
        self.hidden_shape = hidden_states.shape
        self.probs = probs
        tokens_TH = hidden_states.view(-1, self.hidden_shape[-1])
        ids_TK = chosen_experts(routing_map, self.config.moe_router_topk)
        rows_TK, tokens_E = dispatch_map(ids_TK, self.slot_of_expert_E, self.num_experts)
        counts_PRE = self._counts(tokens_E)
        slots_RS = self._choose(counts_PRE.sum(axis=0))
        sent_PRRS = np.stack([split_tokens(each, slots_RS, self._home_slots, self._num_nodes) for each in counts_PRE])
        if self._listener is not None and self.training and torch.is_grad_enabled():  # recomputation counts once
            self._listener(counts_PRE.sum(axis=0), sent_PRRS.sum(axis=0))
        self._lay_out(sent_PRRS)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        mine_RS = sent_PRRS[self.tp_rank, self.ep_group.rank()]
        self.rows_TK = shifted_rows(rows_TK, *segment_shifts(mine_RS, slots_RS))
        num_rows = int(self.num_out_tokens)
        weights_TK = probs.gather(1, ids_TK.clamp(max=self.num_experts - 1))
        return permute(tokens_TH, self.rows_TK, num_rows), self._sorted(weights_TK, num_rows)

    def _counts(self, tokens_E: torch.Tensor) -> IntArray:
        """Everybody's tokens per home, `[P, R, E]`, on the host: the one synchronisation of the layer."""
        counts = tokens_E.new_empty(self.ep_size * self.tp_size * self.num_experts)
        dist.all_gather_into_tensor(counts, tokens_E, group=self.tp_ep_group)
        counts_RPE = counts.cpu().numpy().reshape(self.ep_size, self.tp_size, self.num_experts)
        return np.ascontiguousarray(counts_RPE.transpose(1, 0, 2))

    def _choose(self, counts_RE: IntArray) -> IntArray:
        """The slots that serve this micro-batch."""
        if not self.training:
            return self._homes_RS
        if self._plan is not None:
            self.slots_RS = self._plan(counts_RE)
            used = self._spare.use(self.slots_RS, num_passes=1)
            if used is not None and self._fetch_early:
                used.start()
        return self.slots_RS

    def _lay_out(self, sent_PRRS: IntArray) -> None:
        """What Megatron's exchange wants to know, all of it on the host."""
        rank = self.ep_group.rank()
        arriving_PRS = sent_PRRS[:, :, rank]
        leaving_RS = sent_PRRS[self.tp_rank, rank]
        self.num_out_tokens = int(leaving_RS.sum())
        self.input_splits = leaving_RS.sum(axis=1).tolist()
        self.output_splits = arriving_PRS[self.tp_rank].sum(axis=1).tolist()
        self.output_splits_tp = torch.from_numpy(arriving_PRS.sum(axis=(1, 2)))
        self.num_global_tokens_per_local_expert = torch.from_numpy(arriving_PRS.reshape(-1, arriving_PRS.shape[2]))
        tokens_S = torch.from_numpy(arriving_PRS.sum(axis=(0, 1)))
        with_copies = self.training and self._spare.in_use is not None
        self.tokens_per_expert = self._tokens_on_device_S = tokens_S if with_copies else tokens_S[: self._home_slots]

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        """Nothing to bring to the host: it is there."""
        assert tokens_per_expert is not None
        return tokens_per_expert
