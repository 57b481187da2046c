"""All-to-all in pieces: rows travel between some pairs of ranks while others are computed on, forward and backward.

The ranks of a group form D rings of pairs: in piece g, rank r sends to the ranks r + d and receives from the ranks
r - d, for the offsets d of that piece. Piece 0 has the offset 0, a rank's own rows, which need no wire. Every rank
takes part in every piece, with zero rows for the ranks that are not in it (an `all_to_all_single`, which NCCL and gloo
both have), so the ranks post the same collectives in the same order whatever their counts are.

An exchange is two autograd functions. Forward, `start` posts it and `finish` waits for it. Backward runs in the
opposite order: the backward of `finish` posts the exchange of the gradients, the backward of `start` waits for it.
Autograd runs what is ready from the last created to the first, so a backward pass is pipelined as its forward pass is,
mirrored, and posts in the same order on all ranks, as long as no rank leaves a piece out.

Rows cut by token count would overlap too, but every piece would need counts of its own; rows cut by peer use the counts
that the dispatcher has gathered anyway.
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
class PeerGroup:
    """One piece of an all-to-all, as one rank sees it; ranks in ascending order.

    Attributes:
        targets: ranks that this rank sends to.
        sources: ranks that it receives from.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]


def peer_groups(rank: int, num_ranks: int, degree: int) -> list[PeerGroup]:
    """The pieces of an all-to-all of `num_ranks` ranks, cut into `degree` runs of consecutive offsets."""
    assert 1 <= degree <= num_ranks, f"{num_ranks} ranks cannot be cut into {degree} groups"
    groups = []
    for piece in range(degree):
        offsets = range(piece * num_ranks // degree, (piece + 1) * num_ranks // degree)
        groups.append(
            PeerGroup(
                targets=tuple(sorted((rank + offset) % num_ranks for offset in offsets)),
                sources=tuple(sorted((rank - offset) % num_ranks for offset in offsets)),
            )
        )
    return groups


def cut(rows_N: torch.Tensor, sizes_R: Sequence[int], parts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Cut rows that lie in the order of ranks; consecutive ranks of a part stay one piece and are not copied.

    Args:
        rows_N: `[N, ...]`.
        sizes_R: rows of each rank.
        parts: ranks of each part, ascending; every rank is in one.

    Returns:
        The rows of each part, in the order of its ranks.
    """
    runs = _runs(sizes_R, parts)
    pieces: list[list[torch.Tensor]] = [[] for _ in parts]
    for (part, _), piece in zip(runs, rows_N.split([size for _, size in runs]), strict=True):
        pieces[part].append(piece)
    return [piece[0] if len(piece) == 1 else torch.cat(piece) for piece in pieces]


def join(
    rows_of_parts: Sequence[torch.Tensor], sizes_R: Sequence[int], parts: Sequence[tuple[int, ...]]
) -> torch.Tensor:
    """The inverse of `cut`: `[N, ...]` in the order of ranks."""
    runs = _runs(sizes_R, parts)
    pieces = [
        iter(rows.split([size for part, size in runs if part == index])) for index, rows in enumerate(rows_of_parts)
    ]
    return torch.cat([next(pieces[part]) for part, _ in runs])


def _runs(sizes_R: Sequence[int], parts: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Runs of consecutive ranks of one part, in the order of ranks: (part, rows)."""
    part_of_rank = {rank: index for index, part in enumerate(parts) for rank in part}
    return [
        (part, sum(sizes_R[rank] for rank in ranks)) for part, ranks in groupby(range(len(sizes_R)), part_of_rank.get)
    ]


class RowExchange:
    """One piece of an all-to-all, and in the backward pass the way back of its gradients. For one use.

    Args:
        group: all of its ranks take part, in the same order among the group's other collectives.
        sent_R: rows for each rank.
        received_R: rows from each rank.
    """

    def __init__(self, group: dist.ProcessGroup, sent_R: Sequence[int], received_R: Sequence[int]) -> None:
        self._group, self._sent_R, self._received_R = group, list(sent_R), list(received_R)
        self._works: list[dist.Work] = []
        self._in_flight: tuple[Rows, Rows] | None = None  # memory that must not be freed while it is written or read

    def start(self, *rows: torch.Tensor) -> Rows:
        """Post the exchange of tensors `[N, ...]`. What it returns holds nothing before `finish`."""
        posted: Rows = _Start.apply(self, *rows)
        return posted

    def finish(self, *posted: torch.Tensor) -> Rows:
        """Wait. On a GPU the current stream waits, the host does not.

        Args:
            posted: what `start` returned.
        """
        arrived: Rows = _Finish.apply(self, *posted)
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

    def _land(self) -> Rows:
        """Wait for what was posted. The memory was allocated on the stream that waits, so it is free for reuse then."""
        assert self._in_flight is not None, "an exchange was waited for that nobody posted"
        for work in self._works:
            work.wait()
        _, arrived = self._in_flight
        self._works, self._in_flight = [], None
        return arrived


class _Start(torch.autograd.Function):
    """Forward: post. Backward: wait for the gradients that `_Finish` posted."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, *rows: torch.Tensor) -> Rows:
        ctx.exchange = exchange
        return exchange._post(rows, exchange._sent_R, exchange._received_R)

    @staticmethod
    def backward(ctx: Any, *posted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.exchange._land()


class _Finish(torch.autograd.Function):
    """Forward: wait. Backward: post the gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, *posted: torch.Tensor) -> Rows:
        ctx.exchange = exchange
        exchange._land()
        return posted

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange = ctx.exchange
        exchange._post(gradients, exchange._received_R, exchange._sent_R)
        return None, *gradients  # of the shape that autograd expects between the two; nobody reads them
