"""All-to-all in chunks: rows travel between some pairs of ranks while others are computed on, forward and backward.

The ranks of a group form D rings of pairs: in chunk g, rank r sends to the ranks r + d and receives from the ranks
r - d, for the offsets d of that chunk. Chunk 0 has the offset 0, a rank's own rows, which stay in memory. Every rank
takes part in every chunk, with zero rows for the ranks that are not in it (an `all_to_all_single`, which NCCL and gloo
both have), so the ranks post the same collectives in the same order whatever their counts are.

An exchange is two autograd functions. Forward, `start` posts it and `finish` waits for it. Backward runs in the
opposite order: the backward of `finish` posts the exchange of the gradients, the backward of `start` waits for it.
Autograd runs what is ready from the last created to the first, so a backward pass is pipelined as its forward pass is,
mirrored, and posts in the same order on all ranks, as long as no rank leaves a chunk out.

In which order chunks are launched is another matter (`LaunchOrder`): a GPU with one hardware queue, which Megatron asks
for with tensor parallelism before Blackwell, starts nothing that was launched behind something that is not ready.

Chunks of equal token counts would overlap too, but each would need an exchange of its own counts; chunks by peer use
the counts that the dispatcher has gathered anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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


class LaunchOrder:
    """When the exchanges of a layer are launched, so that with one hardware queue none is in the way of a computation.

    A computation needs a chunk to have arrived; its own exchange is launched when its rows exist. Launched as soon as
    they are posted, all dispatches would be ahead of the first computation, which a GPU with one queue starts only when
    the last of them starts. So exchanges are held back:

    - A dispatch (in the backward pass: the return of a combine's gradients) is launched when the one before it is
      waited for, that is one ahead of what is computed, and the first at once.
    - A combine (in the backward pass: the return of a dispatch's gradients) is launched behind the next chunk's
      computation, and the last when the first of them is waited for.

    The order depends on nothing but the order of the calls, so it is the same on all ranks. An object serves one
    forward and one backward pass of a layer.
    """

    def __init__(self) -> None:
        self._held: dict[bool, list[RowExchange]] = {True: [], False: []}  # that lead, in the order of posting
        self._num_leading = 0

    def post(self, exchange: RowExchange, *, leads: bool) -> None:
        """Launch an exchange when its turn comes.

        Args:
            exchange: All that it sends exists behind the present end of the current stream.
            leads: Whether computations wait for it; the others wait for computations.
        """
        if leads:
            self._num_leading += 1
            self._held[True].append(exchange)
            if self._num_leading == 1:
                self._launch(leading=1)
        else:
            self._launch(following=len(self._held[False]))
            self._held[False].append(exchange)

    def wait(self, exchange: RowExchange, *, leads: bool) -> None:
        """Launch what must be launched before the current stream may wait for an exchange."""
        if leads:
            held = self._held[True]
            self._launch(leading=held.index(exchange) + 2 if exchange in held else 1)
        else:
            self._launch(leading=len(self._held[True]), following=len(self._held[False]))
        if not (self._held[True] or self._held[False]) and not leads:
            self._num_leading = 0  # the backward pass comes next

    def _launch(self, *, leading: int = 0, following: int = 0) -> None:
        for leads, number in ((True, leading), (False, following)):
            for _ in range(min(number, len(self._held[leads]))):
                self._held[leads].pop(0).launch()


class RowExchange:
    """One chunk of an all-to-all, and in the backward pass the return of its gradients. An object serves once.

    Args:
        group: All of its ranks take part, in the same order among the group's other collectives.
        sent_R: Number of rows for each rank.
        received_R: Number of rows from each rank.
        order: When the layer's exchanges are launched; None to launch them as soon as they are posted.
        leads: Whether it brings what is computed, and not what was computed; see `LaunchOrder`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        sent_R: Sequence[int],
        received_R: Sequence[int],
        *,
        order: LaunchOrder | None = None,
        leads: bool = True,
    ) -> None:
        self._group, self._sent_R, self._received_R = group, list(sent_R), list(received_R)
        self._order, self._leads, self._backward = order, leads, False
        self._unlaunched: Callable[[], None] | None = None
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
        behind = torch.cuda.current_stream().record_event() if arriving[0].is_cuda else None
        self._unlaunched = partial(self._exchange, rows, arriving, sent_R, received_R, behind)
        if self._order is None:
            self.launch()
        else:
            self._order.post(self, leads=self._leads != self._backward)
        return arriving

    def launch(self) -> None:
        """Launch what was posted, if that was not done."""
        if self._unlaunched is not None:
            self._unlaunched()
            self._unlaunched = None

    def _exchange(
        self, rows: Rows, arriving: Rows, sent_R: list[int], received_R: list[int], behind: torch.cuda.Event | None
    ) -> None:
        """Exchange rows that exist behind an event; what the current stream does after it is not waited for."""
        with nullcontext() if behind is None else torch.cuda.stream(_launch_stream(behind)):
            for output, tensor in zip(arriving, rows, strict=True):
                work = dist.all_to_all_single(output, tensor, received_R, sent_R, group=self._group, async_op=True)
                self._works.append(work)

    def _wait(self) -> Rows:
        """Wait for what was posted. Its memory was allocated on the stream that waits, so it is free for reuse then."""
        assert self._in_flight is not None, "an exchange was waited for before it was posted"
        if self._order is not None:
            self._order.wait(self, leads=self._leads != self._backward)
        for work in self._works:
            work.wait()
        _, arrived = self._in_flight
        self._works, self._in_flight = [], None
        return arrived


_launch_streams: dict[int, torch.cuda.Stream] = {}


def _launch_stream(behind: torch.cuda.Event) -> torch.cuda.Stream:
    """A stream that waits for an event and runs nothing: what NCCL launches from it waits for that and no more."""
    device = torch.cuda.current_device()
    if device not in _launch_streams:
        _launch_streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    _launch_streams[device].wait_event(behind)
    return _launch_streams[device]


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
        exchange._backward = True
        exchange._post(gradients, exchange._received_R, exchange._sent_R)
        return None, *gradients  # placeholders of the shape that autograd expects; `_Start` returns the real ones
