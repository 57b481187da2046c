"""SlotDispatcher: Megatron's all-to-all dispatcher on slots, with this project's kernels for its permutations.

What differs from `MoEAlltoAllTokenDispatcher`:
- tokens are sorted by slot, not by expert; the table from experts to slots is fused into the sort, and a token's
  weights are moved with its rows, and sent with them in one exchange (see `ops.packed`);
- what arrives is sorted by slot with one map of rows (see `chunk_order`), and not at all where it has one source;
- the combine adds a token's k results in the order of its logical experts. Megatron adds them in the order of the
  slots, so that moving an expert would change the last bits for k > 2. With homes in logical order both are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.chunk_order import Blocks, ChunkOrder
from megatron_smartmoe.adapter.moe.graphs import holds_preprocessing
from megatron_smartmoe.ops import chosen_experts, dispatch_map, packed, permute_packed, permute_weighted, unpermute
from megatron_smartmoe.ops.grouped_linear import wants_counts_on_device


class SlotDispatcher(MoEAlltoAllTokenDispatcher):
    """Dispatches to slots.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        local_expert_indices: this rank's home slots, counted over the whole layer.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `tp_ep` are used.
        counts_on_device: whether the experts take their tokens per slot on the device, where a GEMM reads them there.

    Attributes:
        slot_of_expert_E: int64, on the device; the layer sets it before each dispatch.
        num_chunks: chunks of the exchange, for a layer that exchanges the rows itself and sets it.
    """

    num_chunks = 1

    slot_of_expert_E: torch.Tensor
    num_global_tokens_per_local_expert: Any = None  # rows [sources, slots]; Megatron's preprocess sets it
    _arriving_QS: torch.Tensor | None = None  # the same on the device, where it is there
    tokens_per_expert: Any = None  # rows of each slot of this rank, or None; Megatron's dispatcher reads it
    num_out_tokens: Any  # rows that this rank sends, an int or a tensor; Megatron's dispatcher reads it

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        counts_on_device: bool,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        self._counts_on_device = counts_on_device
        self._is_graphed = holds_preprocessing(config)
        self.cudagraph_attrs += ["rows_TK", "_tokens_on_device_S", "_arriving_QS"]
        self._order: ChunkOrder | None = None  # from `dispatch_postprocess` to `combine_preprocess` of one micro-batch

    @property
    def packs(self) -> bool:
        """Whether rows and their weights are exchanged together, forward and backward.

        The permutations before and behind the exchange write and read packed rows as they would any. Where one of them
        is missing, packing would be a copy of all rows: with one slot, or one source in a chunk, nothing is sorted;
        expert tensor parallelism adds gradients up; and overlapping micro-batches, and the permutation in a CUDA graph,
        get the gradients of rows and weights apart from each other. On a GPU such a copy takes longer than the
        collective that it would save.
        """
        has_sources = self.ep_size >= 2 * self.num_chunks and self.tp_size == 1
        apart = self.config.overlap_moe_expert_parallel_comm or self._permutes_in_graph
        return has_sources and self.num_local_experts > 1 and not apart

    @property
    def _permutes_in_graph(self) -> bool:
        """Whether the permutation before the exchange is made for a CUDA graph."""
        return self._is_graphed

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort this rank's tokens by slot.

        Args:
            hidden_states: `[..., H]`, T tokens.
            routing_map: which logical experts each token chose, bool `[T, E]`.
            probs: their weights, `[T, E]`.

        Returns:
            Rows `[N, H]` in the order of the slots, and their weights `[N]`.
        """
        self.hidden_shape = hidden_states.shape
        self.probs = probs
        tokens_TH = hidden_states.view(-1, self.hidden_shape[-1])
        # Step 1: the row of every choice in the order of the home slots, and the tokens of each
        ids_TK, weights_TK = chosen_experts(routing_map, probs, self.config.moe_router_topk)
        rows_TK, tokens_E = dispatch_map(ids_TK, self.slot_of_expert_E, self.num_experts)
        # Step 2: how many rows go where
        self.rows_TK = self._set_splits(rows_TK, tokens_E)
        # Step 3: the shared experts' gather overlaps with the permutation and the copy of the counts to the host
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        # Step 4: rows and weights in the order in which they are sent
        return self._permuted(tokens_TH, weights_TK)

    def _permuted(self, tokens_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights in the order in which they are sent, `[N, H]` and `[N]`."""
        arguments = tokens_TH, weights_TK, self.rows_TK, int(self.num_out_tokens)
        if not self.packs:
            return permute_weighted(*arguments)
        return packed.unpack(permute_packed(*arguments), tokens_TH.shape[1], weights_TK.dtype)

    def _set_splits(self, rows_TK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
        """Set the counts and split sizes that Megatron's all-to-all reads.

        Args:
            rows_TK: the row of each choice when rows are sorted by home slot, `[T, K_top]`; -1 for a dropped choice.
            tokens_E: rows of each home slot of the layer.

        Returns:
            The row of each choice in the order in which rows are sent, `[T, K_top]`.
        """
        # Megatron's preprocess sums a routing map over its rows; the sums are known, so the map has this one row
        self.tokens_per_expert = self._tokens_on_device_S = self.preprocess(tokens_E.unsqueeze(0))
        self._arriving_QS = self.num_global_tokens_per_local_expert  # on the device; Megatron copies it to the host
        if self.config.moe_expert_capacity_factor is None:
            self.num_out_tokens = rows_TK.numel()
        return rows_TK

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's exchange, of rows and weights together where they are packed; shared experts run beside it."""
        if not self.packs:
            rows_and_weights: tuple[torch.Tensor, torch.Tensor] = super().token_dispatch(
                permutated_local_input_tokens, permuted_probs
            )
            return rows_and_weights
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        arrived_NP = all_to_all(
            self.ep_group,
            packed.pack(permutated_local_input_tokens, permuted_probs),
            self.output_splits,
            self.input_splits,
            use_nccl_stream=self.use_nccl_stream,
        )
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(arrived_NP)  # for its place in the graph alone
        return packed.unpack(arrived_NP, permutated_local_input_tokens.shape[1], permuted_probs.dtype)

    def home_rows(self, tokens_S: torch.Tensor) -> int | None:
        """Rows of the home slots among those of all slots; None where the experts want them in one piece."""
        return None

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor | Blocks, torch.Tensor, torch.Tensor | Blocks]:
        """Sort what has arrived by slot; experts whose GEMMs read the counts on the device get them there.

        Returns:
            Rows, rows of each slot, and weights; rows and weights in two blocks where `home_rows` gives a number.
        """
        rows_NH, weights_N = global_input_tokens, global_probs
        if self.tp_size > 1:
            sizes_P = None if self.output_splits_tp is None else self.output_splits_tp.tolist()
            rows_NH, weights_N = (
                gather_from_sequence_parallel_region(each, group=self.tp_group, output_split_sizes=sizes_P)
                for each in (rows_NH, weights_N)
            )
        tokens_S = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        self._order = self._order_of(rows_NH)
        rows: torch.Tensor | Blocks = rows_NH
        weights: torch.Tensor | Blocks = weights_N
        if self._order is not None:
            home_rows = self.home_rows(tokens_S)
            rows, weights = self._order.sort(rows_NH, weights_N, packs=self.packs, home_rows=home_rows)
        tokens_S = self._maybe_dtoh_and_synchronize("before_finish", tokens_S)
        self.tokens_per_expert = None
        on_device = self._counts_on_device and wants_counts_on_device(rows_NH)
        return rows, self._tokens_on_device_S if on_device else tokens_S, weights

    def _order_of(self, rows_NH: torch.Tensor) -> ChunkOrder | None:
        """How the rows that have arrived are sorted; None where they are sorted already."""
        if self.num_local_experts == 1 or self.tp_size * self.ep_size == 1:
            return None
        counts_QS = self._arriving_QS if self._arriving_QS is not None else self.num_global_tokens_per_local_expert
        return ChunkOrder.of(counts_QS, rows_NH)

    def combine_preprocess(self, hidden_states: torch.Tensor | Blocks) -> torch.Tensor:
        """Bring the experts' output back into the order in which rows arrived, and add up the expert-tensor parts."""
        if self._order is None:
            assert isinstance(hidden_states, torch.Tensor), "rows that nobody has sorted are in one piece"
            output_NH = hidden_states
        else:
            output_NH = self._order.restore(hidden_states)
        if self.tp_size == 1:
            return output_NH
        sizes_P = None if self.output_splits_tp is None else self.output_splits_tp.tolist()
        summed_NH: torch.Tensor = reduce_scatter_to_sequence_parallel_region(
            output_NH.to(self.probs.dtype), group=self.tp_group, input_split_sizes=sizes_P
        )
        return summed_NH.to(output_NH.dtype)

    def traffic(self) -> tuple[list[int], torch.Tensor]:
        """The sizes of the all-to-all, for a layer that exchanges the rows itself.

        Waits for the counts at the same points as Megatron's exchange does.

        Returns:
            Rows that this rank sends to each rank `[R]`, and rows that arrive at each of the P expert-tensor ranks from
            each rank for each slot, `[P, R, slots]` on the host.
        """
        tokens_S: torch.Tensor = self.tokens_per_expert
        for point in ("before_ep_alltoall", "before_permutation_2", "before_finish"):
            tokens_S = self._maybe_dtoh_and_synchronize(point, tokens_S)
        num_slots, self.tokens_per_expert = len(tokens_S), None
        sent_R = [int(size) for size in self.input_splits]
        if self.num_local_experts == 1:  # then Megatron keeps only the counts of this rank
            return sent_R, self._arriving_at_all().unsqueeze(2).cpu()
        arriving_PRS = self.num_global_tokens_per_local_expert.view(self.tp_size, len(sent_R), -1)
        # with --moe-permute-fusion Megatron leaves the counts on the device; otherwise they are on the host already
        return sent_R, arriving_PRS[:, :, :num_slots].cpu()

    def _arriving_at_all(self) -> torch.Tensor:
        """Rows that arrive at each of the P expert-tensor ranks from each rank, `[P, R]`."""
        arriving_R = torch.as_tensor(self.output_splits)
        if self.tp_size == 1:
            return arriving_R.unsqueeze(0)
        arriving_R = arriving_R.to(self.rows_TK.device)
        arriving = arriving_R.new_empty(self.tp_size * self.ep_size)
        dist.all_gather_into_tensor(arriving, arriving_R, group=self.tp_group)
        return arriving.view(self.tp_size, self.ep_size)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Add up each token's results in the order of its experts, and the shared experts' output."""
        output = unpermute(permutated_local_input_tokens, self.rows_TK, None).view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output
