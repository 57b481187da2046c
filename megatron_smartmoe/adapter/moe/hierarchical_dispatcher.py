"""Dispatchers whose tokens cross nodes once for each node, whatever the number of their experts there.

Everything but the exchange of rows is the flat dispatcher's: what experts get, and what a token's results are added up
from, are the same rows in the same order (see `runtime.hierarchical_exchange`). The weights of the choices, four bytes
each, take the flat exchange.

Without spare slots the sizes of both hops follow from the counts of all ranks. Megatron gathers those on the device and
brings sums of them to the host; here they come to the host whole and before the permutation, with the rows for each
node behind them: the one synchronisation is moved, none is added. With spare slots a gateway cannot tell from the
counts how many rows will reach it, since tokens are split afterwards: one more exchange of a few numbers tells it, and
the host waits for that one too.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.dispatcher import SlotDispatcher
from megatron_smartmoe.adapter.moe.replica_dispatcher import ReplicaDispatcher
from megatron_smartmoe.runtime.hierarchical_exchange import (
    ExchangeSizes,
    HierarchicalExchange,
    RowsOnce,
    exchange_sizes,
    rows_once,
)


class _InTwoHops(SlotDispatcher):
    """What both dispatchers share: the exchange of rows and of their weights."""

    _rows: RowsOnce  # from `dispatch_preprocess` to `token_dispatch` of one micro-batch
    _sizes: ExchangeSizes
    _exchange: HierarchicalExchange  # from `token_dispatch` to `token_combine`
    packs = False  # rows cross the nodes once for several weights

    @property
    def port_rows(self) -> int:
        """Rows over this rank's port in the micro-batch's mean exchange; what times the steps reads it."""
        return self._sizes.port_rows(self.ep_rank)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exchange the rows in two hops, and their weights flat; shared experts run beside them as in Megatron's."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        self._exchange = HierarchicalExchange(self.ep_group, self._rows, self._sizes)
        arrived_NH = self._exchange.dispatch(permutated_local_input_tokens)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(arrived_NH)
        weights_N = all_to_all(
            self.ep_group,
            permuted_probs,
            self.output_splits,
            self.input_splits,
            use_nccl_stream=self.use_nccl_stream,
        )
        return arrived_NH, weights_N

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Bring the results back; shared experts run beside it as in Megatron's."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        returned_NH = self._exchange.combine(hidden_states)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(returned_NH)
            self.shared_experts.post_forward_comm()
        return returned_NH


class HierarchicalDispatcher(_InTwoHops):
    """Dispatches to home slots in two hops.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        local_expert_indices: this rank's home slots, counted over the whole layer.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `tp_ep` are used.
        num_nodes: nodes that the expert-parallel group lies on, consecutive ranks together.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        num_nodes: int,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, counts_on_device=True)
        self._num_nodes = num_nodes

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Set the sizes of all hops; see `SlotDispatcher`."""
        # Step 1: which rows are sent to a node
        self._rows = rows_once(rows_TK, tokens_E.view(self._num_nodes, -1).sum(dim=1).cumsum(0))
        # Step 2: the counts of all ranks, and their rows for each node
        own = torch.cat((tokens_E, self._rows.number_N))
        gathered = own.new_empty(self.ep_size * self.tp_size * len(own))
        dist.all_gather_into_tensor(gathered, own, group=self.tp_ep_group)
        numbers_PRX = gathered.view(self.ep_size, self.tp_size, -1).transpose(0, 1).cpu()
        counts_PRE, once_PRN = numbers_PRX.tensor_split([len(tokens_E)], dim=2)
        # Step 3: the sizes that follow
        self._set_sizes(counts_PRE)
        sent_RR = counts_PRE[self.tp_rank].reshape(self.ep_size, self.ep_size, -1).sum(dim=2)
        self._sizes = ExchangeSizes.of(sent_RR.numpy(), once_PRN[self.tp_rank].numpy(), self.ep_rank)
        return rows_TK

    def _set_sizes(self, counts_PRE: torch.Tensor) -> None:
        """Set the attributes that the rest of the dispatcher reads, all of them on the host."""
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1]
        arriving_PRS = counts_PRE[:, :, first : last + 1]
        own_E = counts_PRE[self.tp_rank, self.ep_rank]
        self.num_out_tokens = int(own_E.sum())
        self.input_splits = own_E.view(self.ep_size, -1).sum(dim=1).tolist()
        self.output_splits = arriving_PRS[self.tp_rank].sum(dim=1).tolist()
        self.output_splits_tp = arriving_PRS.sum(dim=(1, 2))
        self.num_global_tokens_per_local_expert = arriving_PRS.reshape(-1, self.num_local_experts)
        self.tokens_per_expert = self._tokens_on_device_S = arriving_PRS.sum(dim=(0, 1))

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        """Return the counts as they are: they are on the host already."""
        assert tokens_per_expert is not None
        return tokens_per_expert


class HierarchicalReplicaDispatcher(_InTwoHops, ReplicaDispatcher):
    """Dispatches to home slots and spare slots in two hops; see `ReplicaDispatcher`."""

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Plan the replicas, split the tokens, and set the sizes of all hops; see `SlotDispatcher`."""
        # Step 1: the plan, and the rows that it sends to a node
        moved_TK = super()._set_splits(rows_TK, tokens_E)
        sent_NL, received_NL = (
            np.array(each).reshape(self.planner.view.num_nodes, -1) for each in (self.input_splits, self.output_splits)
        )
        ends_N = torch.from_numpy(sent_NL.sum(axis=1).cumsum()).to(rows_TK.device, non_blocking=True)
        self._rows = rows_once(moved_TK, ends_N)
        # Step 2: what reaches the gateways
        self._sizes = exchange_sizes(self.ep_group, self._rows.number_N, sent_NL, received_NL)
        return moved_TK
