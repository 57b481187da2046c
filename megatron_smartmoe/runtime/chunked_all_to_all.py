"""All-to-all in chunks: rows travel between some pairs of ranks while others are computed on, forward and backward.

The ranks of a group form D rings of pairs: in chunk g, rank r sends to the ranks r + d and receives from the ranks
r - d, for the offsets d of that chunk. Chunk 0 has the offset 0, a rank's own rows, which stay in memory. Every rank
takes part in every chunk, with zero rows for the ranks that are not in it (an `all_to_all_single`, which NCCL and gloo
both have), so the ranks post the same collectives in the same order whatever their counts are.

An exchange is two autograd functions. Forward, `start` posts it and `finish` waits for it. Backward runs in the
opposite order: the backward of `finish` posts the exchange of the gradients, the backward of `start` waits for it.
Autograd runs what is ready from the last created to the first, so a backward pass is pipelined as its forward pass is,
mirrored, and posts in the same order on all ranks, as long as no rank leaves a chunk out.

Chunks of equal token counts would overlap too, but each would need an exchange of its own counts; chunks by peer use
the counts that the dispatcher has gathered anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

Rows = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ChunkPeers:
    """The peers of one rank in one chunk of an all-to-all.

    Attributes:
        targets: Ranks that this rank sends to, ascending.
        sources: Ranks that it receives from, ascending.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]


def chunk_peers(rank: int, num_ranks: int, degree: int) -> list[ChunkPeers]:
    """One rank's peers in each of the `degree` chunks of an all-to-all; a chunk is a run of consecutive offsets."""
    assert 1 <= degree <= num_ranks, f"an all-to-all of {num_ranks} ranks cannot have {degree} chunks"
    chunks = []
    for chunk in range(degree):
        offsets = range(chunk * num_ranks // degree, (chunk + 1) * num_ranks // degree)
        chunks.append(
            ChunkPeers(
                targets=tuple(sorted((rank + offset) % num_ranks for offset in offsets)),
                sources=tuple(sorted((rank - offset) % num_ranks for offset in offsets)),
            )
        )
    return chunks


def split_rows(rows_N: torch.Tensor, sizes_R: Sequence[int], chunks: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Split rows in the order of the ranks into chunks. A chunk of consecutive ranks is a view, any other is copied.

    Args:
        rows_N: The rows `[N, ...]`.
        sizes_R: Number of rows of each rank.
        chunks: Ranks of each chunk, ascending; every rank is in one of them.

    Returns:
        The rows of each chunk, in the order of its ranks.
    """
    runs = _runs(sizes_R, chunks)
    rows_of_chunks: list[list[torch.Tensor]] = [[] for _ in chunks]
    for (chunk, _), rows in zip(runs, torch.split(rows_N, [size for _, size in runs]), strict=True):
        rows_of_chunks[chunk].append(rows)
    return [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in rows_of_chunks]


def join_rows(
    rows_of_chunks: Sequence[torch.Tensor], sizes_R: Sequence[int], chunks: Sequence[tuple[int, ...]]
) -> torch.Tensor:
    """The inverse of `split_rows`: `[N, ...]` in the order of the ranks."""
    runs = _runs(sizes_R, chunks)
    rows_of_runs = [
        iter(torch.split(rows, [size for chunk, size in runs if chunk == index]))
        for index, rows in enumerate(rows_of_chunks)
    ]
    return torch.cat([next(rows_of_runs[chunk]) for chunk, _ in runs])


def _runs(sizes_R: Sequence[int], chunks: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Runs of consecutive ranks of one chunk, in the order of the ranks: (index of the chunk, number of rows)."""
    chunk_of_rank = {rank: index for index, chunk in enumerate(chunks) for rank in chunk}
    return [
        (chunk, sum(sizes_R[rank] for rank in ranks))
        for chunk, ranks in groupby(range(len(sizes_R)), chunk_of_rank.__getitem__)
    ]


class RowExchange:
    """One chunk of an all-to-all, and in the backward pass the return of its gradients. An object serves once.

    Args:
        group: All of its ranks take part, in the same order among the group's other collectives.
        sent_R: Number of rows for each rank.
        received_R: Number of rows from each rank.
    """

    def __init__(self, group: dist.ProcessGroup, sent_R: Sequence[int], received_R: Sequence[int]) -> None:
        self._group, self._sent_R, self._received_R = group, list(sent_R), list(received_R)
        self._works: list[dist.Work] = []
        self._in_flight: tuple[Rows, Rows] | None = None  # memory that must not be freed while it is written or read

    def start(self, *rows: torch.Tensor) -> Rows:
        """Post the exchange of tensors `[N, ...]`. The tensors that it returns are undefined until `finish`."""
        posted: Rows = _Start.apply(self, *rows)  # type: ignore[no-untyped-call]
        return posted

    def finish(self, *posted: torch.Tensor) -> Rows:
        """Wait for the exchange; on a GPU the current stream waits and the host does not.

        Args:
            posted: The tensors that `start` returned.

        Returns:
            The rows that have arrived, in the order of their source ranks.
        """
        arrived: Rows = _Finish.apply(self, *posted)  # type: ignore[no-untyped-call]
        return arrived

    def _post(self, rows: Rows, sent_R: list[int], received_R: list[int]) -> Rows:
        assert self._in_flight is None, "an exchange was posted again before it was waited for"
        rows = tuple(tensor.contiguous() for tensor in rows)
        arriving = tuple(tensor.new_empty((sum(received_R), *tensor.shape[1:])) for tensor in rows)
        self._in_flight = rows, arriving
        for output, tensor in zip(arriving, rows, strict=True):
            work = dist.all_to_all_single(output, tensor, received_R, sent_R, group=self._group, async_op=True)
            self._works.append(work)
        return arriving

    def _wait(self) -> Rows:
        """Wait for what was posted. Its memory was allocated on the stream that waits, so it is free for reuse then."""
        assert self._in_flight is not None, "an exchange was waited for before it was posted"
        for work in self._works:
            work.wait()
        _, arrived = self._in_flight
        self._works, self._in_flight = [], None
        return arrived


class _Start(torch.autograd.Function):
    """Posts the exchange in the forward pass and waits for the gradients, which `_Finish` posted, in the backward."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, *rows: torch.Tensor) -> Rows:
        ctx.exchange = exchange
        return exchange._post(rows, exchange._sent_R, exchange._received_R)

    @staticmethod
    def backward(ctx: Any, *posted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.exchange._wait()


class _Finish(torch.autograd.Function):
    """Waits for the exchange in the forward pass and posts its gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, *posted: torch.Tensor) -> Rows:
        ctx.exchange = exchange
        exchange._wait()
        return posted

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange = ctx.exchange
        exchange._post(gradients, exchange._received_R, exchange._sent_R)
        return None, *gradients  # placeholders of the shape that autograd expects; `_Start` returns the real ones
