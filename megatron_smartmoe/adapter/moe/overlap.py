"""OverlappedMoELayer: dispatch, experts and combine in D pieces, so that rows travel while others are computed on.

FasterMoE's smart schedule (PPoPP 2022) on this project's layer. The pieces are groups of peers (`chunk_peers`). All
dispatches are posted at once; then each piece is waited for, computed, and sent back, and the last function waits for
what comes back. With D = 3:

    wire     dispatch 0 | dispatch 1 | dispatch 2 | combine 0 | combine 1 | combine 2
    compute                experts 0 |  experts 1 |  experts 2 |

The backward pass is the mirror image (see `runtime.chunked_all_to_all`). The experts compute each piece by itself, so
the gradient of a weight is a sum of D products instead of one: losses agree with D = 1 to rounding, not to the bit. A
run that is repeated is bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.adapter.moe.experts import SlottedExperts
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.runtime.chunked_all_to_all import ChunkPeers, RowExchange, chunk_peers, join_rows, split_rows
from megatron_smartmoe.runtime.replicas.slots import SpareSlots


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One group of peers on its way to the experts and back.

    Attributes:
        counts_PQS: rows at each expert-tensor rank from each of its sources for each slot, on the host.
        there: the dispatch; None for a rank's own rows.
        back: the combine; None for a rank's own rows.
        rows: tokens `[N, H]` and their weights `[N]`; before `there` is finished their memory only.
    """

    counts_PQS: torch.Tensor
    there: RowExchange | None
    back: RowExchange | None
    rows: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Returning:
    """The experts' output of one piece on its way back."""

    back: RowExchange | None
    rows: tuple[torch.Tensor, ...]


class OverlappedMoELayer(SmartMoELayer):
    """A SmartMoELayer whose all-to-alls overlap with the experts; same parameters, same checkpoints.

    Args:
        overlap_degree: D, pieces of each all-to-all; 1 to the number of expert-parallel ranks. With 1, which only a
            pool of settings asks for, the layer does what a SmartMoELayer does.
    """

    def __init__(self, config: TransformerConfig, *args: Any, overlap_degree: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.cut_into(overlap_degree)
        self._sent_R: list[int] = []  # rows to each rank, from `dispatch` to `combine` of one micro-batch

    def cut_into(self, overlap_degree: int) -> None:
        """Change the degree; between iterations, and on all ranks alike."""
        self.overlap_degree = overlap_degree
        self._peers = chunk_peers(self.ep_group.rank(), self.ep_group.size(), overlap_degree)
        self._targets = [peers.targets for peers in self._peers]

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Post the dispatch of every piece; returns the pieces, and None for their weights.

        Args:
            hidden_states: rows `[N, H]` in the order of the ranks that they go to.
            probs: their weights `[N]`.
        """
        if self.overlap_degree == 1:
            return super().dispatch(hidden_states, probs)
        dispatcher = self.token_dispatcher
        shared = dispatcher.shared_experts
        if shared is not None:  # as in Megatron's dispatcher: they start beside the dispatch, on a stream of their own
            shared.wait_current_stream()
        self._sent_R, arriving_PRS = dispatcher.traffic()
        rows = split_rows(hidden_states, self._sent_R, self._targets)
        weights = split_rows(probs, self._sent_R, self._targets)
        pieces = [
            self._send(peers, arriving_PRS, *piece) for peers, *piece in zip(self._peers, rows, weights, strict=True)
        ]
        if shared is not None:
            shared.linear_fc1_forward_and_act()
        return pieces, None

    def _send(self, peers: ChunkPeers, arriving_PRS: torch.Tensor, *rows: torch.Tensor) -> _Piece:
        counts_PQS = arriving_PRS[:, list(peers.sources)]
        if peers.sources == (self.ep_group.rank(),):
            return _Piece(counts_PQS=counts_PQS, there=None, back=None, rows=rows)
        sent_R = [size if rank in peers.targets else 0 for rank, size in enumerate(self._sent_R)]
        arriving_R = arriving_PRS[self.token_dispatcher.tp_rank].sum(dim=1).tolist()
        received_R = [size if rank in peers.sources else 0 for rank, size in enumerate(arriving_R)]
        there, back = RowExchange(self.ep_group, sent_R, received_R), RowExchange(self.ep_group, received_R, sent_R)
        return _Piece(counts_PQS=counts_PQS, there=there, back=back, rows=there.start(*rows))

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> Any:
        """Compute each piece when it is there and start its way back; returns what returns, and no bias."""
        if self.overlap_degree == 1:
            return super().routed_experts_compute(hidden_states, probs)
        pieces: list[_Piece] = hidden_states
        returning = []
        with _copies_fetched_once(self.experts):
            for piece in pieces:
                rows = piece.rows if piece.there is None else piece.there.finish(*piece.rows)
                output_NH = self._compute(piece.counts_PQS, *rows)
                back = (output_NH,) if piece.back is None else piece.back.start(output_NH)
                returning.append(_Returning(piece.back, back))
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
        sources, slots = counts_QS.shape
        tokens_S = counts_QS.sum(dim=0)
        if sources == 1 or slots == 1:  # they are in the order of the slots
            return self.experts(rows_NH, tokens_S, weights_N)[0]
        chunks = torch.arange(counts_QS.numel())
        to_slots, to_sources = chunks.view(sources, slots).T.ravel(), chunks.view(slots, sources).T.ravel()
        rows_NH, weights_N = sort_chunks_by_idxs(rows_NH, counts_QS.ravel(), to_slots, probs=weights_N)
        output_NH, _ = self.experts(rows_NH, tokens_S, weights_N)
        return sort_chunks_by_idxs(output_NH, counts_QS.T.ravel(), to_sources)[0]

    def combine(self, output: Any) -> torch.Tensor:
        """Wait for every piece; `[N, H]` in the order of the ranks, as it was sent."""
        if self.overlap_degree == 1:
            combined: torch.Tensor = super().combine(output)
            return combined
        returning: list[_Returning] = output
        shared = self.token_dispatcher.shared_experts
        if shared is not None:
            shared.wait_current_stream()
            shared.linear_fc2_forward()
            shared.post_forward_comm()
        rows = [(piece.rows if piece.back is None else piece.back.finish(*piece.rows))[0] for piece in returning]
        return join_rows(rows, self._sent_R, self._targets)


class _FetchedOnce:
    """Spare slots whose copies enter the autograd graph once a micro-batch, however many pieces use them.

    Their gradients go home after a number of backward passes through that entry (`ReplicasInUse.collect`): an entry for
    each piece would send them D times.
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
def _copies_fetched_once(experts: SlottedExperts) -> Iterator[None]:
    """Within it, the experts compute pieces of one micro-batch."""
    spare = experts.spare_slots
    if spare is None:
        yield
        return
    experts.spare_slots = _FetchedOnce(spare)
    try:
        yield
    finally:
        experts.spare_slots = spare
