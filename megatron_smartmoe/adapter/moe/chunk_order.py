"""The second permutation: rows that arrive in chunks, one for each (source, slot), are sorted by slot, and back.

Megatron cuts rows and weights into a view per chunk and joins them again: sources x slots launches a time, forward and
backward. Here the device makes a map of rows from the counts, and one kernel moves rows and weights. They are moved and
not added, so all bits are Megatron's.

It is also where rows come out of an exchange and gradients go into one, and where the rows of home slots and of spare
slots part and meet again. So it reads and writes packed rows (see `ops.packed`) and two blocks of rows: nothing is
packed, cut or joined in a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_smartmoe.ops import chunk_rows, packed

Blocks = tuple[torch.Tensor, torch.Tensor]  # what belongs to the rows of home slots, and to those of spare slots


@dataclass(frozen=True, kw_only=True)
class ChunkOrder:
    """Where each row goes, and the way back, int32 `[N, 1]` on the device of the rows."""

    to_slots_N1: torch.Tensor
    to_sources_N1: torch.Tensor

    @classmethod
    def of(cls, counts_QS: torch.Tensor, rows_NH: torch.Tensor) -> ChunkOrder | None:
        """The order of these rows; None where both orders are the same: with one source or one slot.

        Args:
            counts_QS: rows from source q for slot s, int64, on the device of the rows or on the host.
            rows_NH: the rows, in the order (source, slot).
        """
        if 1 in counts_QS.shape:
            return None
        counts_QS = counts_QS.to(rows_NH.device, non_blocking=True)
        to_slots_N, to_sources_N = chunk_rows(counts_QS, rows_NH.shape[0])
        return cls(to_slots_N1=to_slots_N[:, None], to_sources_N1=to_sources_N[:, None])

    def sort(
        self, rows_NH: torch.Tensor, weights_N: torch.Tensor, *, packs: bool, home_rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[Blocks, Blocks]:
        """Rows and their weights in the order (slot, source).

        Args:
            rows_NH: the rows, in the order (source, slot).
            weights_N: their weights.
            packs: whether their gradients are exchanged together.
            home_rows: rows of the home slots; None to leave home rows and spare rows together. Only where `packs`.

        Returns:
            Rows and weights, each in two blocks where `home_rows` is given.
        """
        assert packs or home_rows is None, "gradients of two blocks are packed"
        maps = self.to_slots_N1, self.to_sources_N1
        parts = _MoveWeighted.apply(rows_NH, weights_N, *maps, packs, home_rows)  # type: ignore[no-untyped-call]
        return parts if home_rows is None else (parts[:2], parts[2:])

    def restore(self, rows: torch.Tensor | Blocks) -> torch.Tensor:
        """Sorted rows, in one piece or in two blocks, in the order (source, slot) again."""
        blocks = (rows,) if isinstance(rows, torch.Tensor) else rows
        moved_NH: torch.Tensor = _Move.apply(self.to_sources_N1, self.to_slots_N1, *blocks)  # type: ignore[no-untyped-call]
        return moved_NH


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, to_N1: torch.Tensor, back_N1: torch.Tensor, *blocks: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back_N1)
        ctx.sizes = [len(block) for block in blocks]
        move = torch.ops.smartmoe.permute if len(blocks) == 1 else torch.ops.smartmoe.permute_joined
        moved_NH: torch.Tensor = move(*blocks, to_N1, len(to_N1))
        return moved_NH

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back_N1,) = ctx.saved_tensors
        moved_NH = torch.ops.smartmoe.permute(grad_NH, back_N1, len(back_N1))
        return None, None, *torch.split(moved_NH, ctx.sizes)


class _MoveWeighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: torch.Tensor,
        weights_N: torch.Tensor,
        to_N1: torch.Tensor,
        back_N1: torch.Tensor,
        packs: bool,
        home_rows: int | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(back_N1)
        ctx.packs = packs
        moved: Blocks = torch.ops.smartmoe.permute_weighted(rows_NH, weights_N[:, None], to_N1, len(to_N1))
        if home_rows is None:
            return moved
        return tuple(block for each in moved for block in each.tensor_split([home_rows]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back_N1,) = ctx.saved_tensors
        rows, weights = grads[: len(grads) // 2], [grad[:, None] for grad in grads[len(grads) // 2 :]]
        if not ctx.packs:
            moved = torch.ops.smartmoe.permute_weighted(*rows, *weights, back_N1, len(back_N1))
        else:
            blocks = (rows[0], weights[0], *((rows[1], weights[1]) if len(rows) > 1 else (None, None)))
            packed_NP = torch.ops.smartmoe.permute_packed(*blocks, back_N1, len(back_N1))
            moved = packed.views(packed_NP, rows[0].shape[1], weights[0].dtype)
        return *moved, None, None, None, None
