"""OverlappedMoELayer: dispatch, experts and combine in D chunks, so that rows travel while others are computed on.

FasterMoE's smart schedule (PPoPP 2022) on this project's layer. A chunk is the rows that one group of peers exchanges
(`chunk_peers`). All dispatches are posted at once; then each chunk is waited for, computed, and sent back, and
`combine` waits for what comes back. They are launched one ahead of the computation (`LaunchOrder`), so that a GPU with
one hardware queue overlaps them too. With D = 3:

    wire     dispatch 0 | dispatch 1 | dispatch 2 | combine 0 | combine 1 | combine 2
    compute                experts 0 |  experts 1 |  experts 2 |

The backward pass is the mirror image (see `runtime.chunked_all_to_all`). The experts compute each chunk by itself, so
the gradient of a weight is a sum of D products instead of one: losses agree with D = 1 to rounding, not to the bit. A
run that is repeated is bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.chunk_order import ChunkOrder
from megatron_smartmoe.adapter.moe.experts import SlottedExperts
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.te_experts import TEExpertsWithSlots, add_up_passes
from megatron_smartmoe.ops import packed
from megatron_smartmoe.runtime.chunked_all_to_all import (
    ChunkPeers,
    LaunchOrder,
    RowExchange,
    chunk_peers,
    join_rows,
    split_rows,
)
from megatron_smartmoe.runtime.replicas.slots import SpareSlots


@dataclass(frozen=True, kw_only=True)
class _PeerChunk:
    """The rows of one group of peers on their way to the experts.

    Attributes:
        counts_PQS: rows at each expert-tensor rank from each of its sources for each slot, on the host.
        dispatch: the exchange that brings the rows here; None for a rank's own rows.
        combine: the exchange that will take the results back; None for a rank's own rows.
        rows: tokens `[N, H]` and their weights `[N]`, or both packed; unwritten memory until `dispatch` is finished.
    """

    counts_PQS: torch.Tensor
    dispatch: RowExchange | None
    combine: RowExchange | None
    rows: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class _ReturningChunk:
    """The experts' output `[N, H]` of one chunk on its way back; `combine` is None for a rank's own rows."""

    combine: RowExchange | None
    rows: tuple[torch.Tensor, ...]


class OverlappedMoELayer(SmartMoELayer):
    """A SmartMoELayer whose all-to-alls overlap with the experts; same parameters, same checkpoints.

    Args:
        overlap_degree: D, the chunks of each all-to-all: 1 to the number of expert-parallel ranks. With 1, which only
            a pool of settings asks for, the layer does what a SmartMoELayer does.
    """

    def __init__(self, config: TransformerConfig, *args: Any, overlap_degree: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.set_degree(overlap_degree)
        self._sent_R: list[int] = []  # rows to each rank, from `dispatch` to `combine` of one micro-batch
        self._parts = 0, torch.float32  # columns of a row and type of its weight, from `dispatch` to the experts

    def set_degree(self, overlap_degree: int) -> None:
        """Change the degree. All ranks must do this between the same two iterations."""
        self.overlap_degree = overlap_degree
        self._peers = chunk_peers(self.ep_group.rank(), self.ep_group.size(), overlap_degree)
        self._targets = [peers.targets for peers in self._peers]

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A SmartMoELayer's, with a dispatcher that knows into how many chunks its rows will be cut."""
        self.token_dispatcher.num_chunks = self.overlap_degree
        return super().preprocess(hidden_states, probs, routing_map)

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Post the dispatch of every chunk.

        Args:
            hidden_states: rows `[N, H]` in the order of the ranks that they go to.
            probs: their weights `[N]`.

        Returns:
            The chunks, which hold the weights too, and None in the place of the weights.
        """
        if self.overlap_degree == 1:
            return super().dispatch(hidden_states, probs)
        hidden_states, probs = self.resumed(hidden_states, probs)
        dispatcher = self.token_dispatcher
        shared = dispatcher.shared_experts
        if shared is not None:  # as in Megatron's dispatcher: they run beside the dispatch, on a stream of their own
            shared.wait_current_stream()
        self._sent_R, arriving_PRS = dispatcher.traffic()
        sent = (packed.pack(hidden_states, probs),) if dispatcher.packs else (hidden_states, probs)
        self._parts = hidden_states.shape[1], probs.dtype
        rows_of_chunks = zip(*(split_rows(each, self._sent_R, self._targets) for each in sent), strict=True)
        order = LaunchOrder()
        chunks = [
            self._send(peers, arriving_PRS, order, *rows)
            for peers, rows in zip(self._peers, rows_of_chunks, strict=True)
        ]
        if shared is not None:
            shared.linear_fc1_forward_and_act()
        return chunks, None

    def _send(
        self, peers: ChunkPeers, arriving_PRS: torch.Tensor, order: LaunchOrder, *rows: torch.Tensor
    ) -> _PeerChunk:
        """Post the dispatch of one chunk, the rows and weights for the targets of `peers`; see `_PeerChunk`."""
        counts_PQS = arriving_PRS[:, list(peers.sources)]
        if peers.sources == (self.ep_group.rank(),):
            return _PeerChunk(counts_PQS=counts_PQS, dispatch=None, combine=None, rows=rows)
        sent_R = [size if rank in peers.targets else 0 for rank, size in enumerate(self._sent_R)]
        arriving_R = arriving_PRS[self.token_dispatcher.tp_rank].sum(dim=1).tolist()
        received_R = [size if rank in peers.sources else 0 for rank, size in enumerate(arriving_R)]
        dispatch = RowExchange(self.ep_group, sent_R, received_R, order=order)
        combine = RowExchange(self.ep_group, received_R, sent_R, order=order, leads=False)
        return _PeerChunk(counts_PQS=counts_PQS, dispatch=dispatch, combine=combine, rows=dispatch.start(*rows))

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> Any:
        """Compute each chunk when it has arrived and post its combine; returns the chunks on their way, and no bias."""
        if self.overlap_degree == 1:
            return super().routed_experts_compute(hidden_states, probs)
        chunks: list[_PeerChunk] = hidden_states
        returning = []
        if isinstance(self.experts, TEGroupedMLP):
            add_up_passes(self.experts)
        with _replicas_fetched_once(self.experts):
            for chunk in chunks:
                rows = chunk.rows if chunk.dispatch is None else chunk.dispatch.finish(*chunk.rows)
                if len(rows) == 1:
                    rows = packed.unpack(rows[0], *self._parts)
                output_NH = self._compute(chunk.counts_PQS, *rows)
                posted = (output_NH,) if chunk.combine is None else chunk.combine.start(output_NH)
                returning.append(_ReturningChunk(combine=chunk.combine, rows=posted))
        return returning, None

    def _compute(self, counts_PQS: torch.Tensor, rows_NH: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """The experts on rows in the order of (source, slot); `[N, H]` in the same order.

        With expert tensor parallelism each of the P ranks computes a part of all P ranks' rows.
        """
        group, sizes_P = self.token_dispatcher.tp_group, counts_PQS.sum(dim=(1, 2)).tolist()
        if len(sizes_P) > 1:
            rows_NH = gather_from_sequence_parallel_region(rows_NH, group=group, output_split_sizes=sizes_P)
            weights_N = gather_from_sequence_parallel_region(weights_N, group=group, output_split_sizes=sizes_P)
        output_NH = self._compute_by_slot(counts_PQS.flatten(0, 1), rows_NH, weights_N)
        if len(sizes_P) > 1:  # summed in the precision of the weights, as Megatron's dispatcher does
            sums_NH = output_NH.to(weights_N.dtype)
            sums_NH = reduce_scatter_to_sequence_parallel_region(sums_NH, group=group, input_split_sizes=sizes_P)
            output_NH = sums_NH.to(output_NH.dtype)
        return output_NH

    def _compute_by_slot(self, counts_QS: torch.Tensor, rows_NH: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """The experts on blocks of rows (source, slot), which they need in the order (slot, source)."""
        tokens_S = counts_QS.sum(dim=0)
        order = ChunkOrder.of(counts_QS, rows_NH)
        if order is None:
            output_NH: torch.Tensor = self.experts(rows_NH, tokens_S, weights_N)[0]
            return output_NH
        dispatcher = self.token_dispatcher
        rows, weights = order.sort(rows_NH, weights_N, packs=dispatcher.packs, home_rows=dispatcher.home_rows(tokens_S))
        return order.restore(self.experts(rows, tokens_S, weights)[0])

    def combine(self, output: Any) -> torch.Tensor:
        """Wait for every chunk; returns `[N, H]` in the order in which `dispatch` got the rows."""
        if self.overlap_degree == 1:
            combined: torch.Tensor = super().combine(output)
            return combined
        returning: list[_ReturningChunk] = output
        shared = self.token_dispatcher.shared_experts
        if shared is not None:
            shared.wait_current_stream()
            shared.linear_fc2_forward()
            shared.post_forward_comm()
        rows = [(one.rows if one.combine is None else one.combine.finish(*one.rows))[0] for one in returning]
        return join_rows(rows, self._sent_R, self._targets)


class _FetchedOnce:
    """Spare slots whose replicas enter the autograd graph once per micro-batch, however many chunks use them.

    The gradients of replicas are sent home after a fixed number of backward passes through that entry (see
    `runtime.replicas.slots`): an entry for each chunk would send them D times.
    """

    def __init__(self, spare: SpareSlots) -> None:
        self._spare, self.num_slots = spare, spare.num_slots
        self._weights: tuple[torch.Tensor, ...] | None = None

    def weights(self) -> tuple[torch.Tensor, ...]:
        """See `SpareSlots.weights`."""
        if self._weights is None:
            self._weights = self._spare.weights()
        return self._weights


@contextmanager
def _replicas_fetched_once(experts: SlottedExperts | TEGroupedMLP) -> Iterator[None]:
    """Have `experts` fetch the replicas' weights once for all chunks of one micro-batch."""
    spare = experts.spare_slots if isinstance(experts, SlottedExperts | TEExpertsWithSlots) else None
    if spare is None:
        yield
        return
    experts.spare_slots = cast(SpareSlots, _FetchedOnce(spare))  # the two members that the experts use
    try:
        yield
    finally:
        experts.spare_slots = spare
