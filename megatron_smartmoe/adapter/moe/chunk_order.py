"""The second permutation: rows that arrive in chunks, one for each (source, slot), are sorted by slot, and back.

Megatron cuts rows and weights into a view per chunk and joins them again: sources x slots launches a time, forward and
backward. Here the device makes a map of rows from the counts, and one kernel moves rows and weights. They are moved and
not added, so all bits are Megatron's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_smartmoe.ops import chunk_rows


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

    def sort(self, rows_NH: torch.Tensor, weights_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and their weights in the order (slot, source)."""
        maps = self.to_slots_N1, self.to_sources_N1
        rows, weights = _MoveWeighted.apply(rows_NH, weights_N, *maps)  # type: ignore[no-untyped-call]
        return rows, weights

    def restore(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Sorted rows in the order (source, slot) again."""
        moved_NH: torch.Tensor = _Move.apply(rows_NH, self.to_sources_N1, self.to_slots_N1)  # type: ignore[no-untyped-call]
        return moved_NH


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: torch.Tensor, to_N1: torch.Tensor, back_N1: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back_N1)
        moved_NH: torch.Tensor = torch.ops.smartmoe.permute(rows_NH, to_N1, rows_NH.shape[0])
        return moved_NH

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back_N1,) = ctx.saved_tensors
        return torch.ops.smartmoe.permute(grad_NH, back_N1, grad_NH.shape[0]), None, None


class _MoveWeighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NH: torch.Tensor, weights_N: torch.Tensor, to_N1: torch.Tensor, back_N1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(back_N1)
        moved: tuple[torch.Tensor, torch.Tensor] = torch.ops.smartmoe.permute_weighted(
            rows_NH, weights_N[:, None], to_N1, rows_NH.shape[0]
        )
        return moved

    @staticmethod
    def backward(
        ctx: Any, grad_NH: torch.Tensor, grad_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (back_N1,) = ctx.saved_tensors
        rows, weights = torch.ops.smartmoe.permute_weighted(grad_NH, grad_N[:, None], back_N1, grad_NH.shape[0])
        return rows, weights, None, None
