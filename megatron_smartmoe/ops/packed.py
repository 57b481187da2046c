"""Rows with their weights behind them in memory, so that one exchange takes both.

A packed row is the row's H elements, the weight with its own bits, and what is missing to a multiple of 16 bytes: with
4,096 columns in bf16 that is 16 bytes of 8,208. Whoever handles rows and weights gets two views of one buffer, and who
sends them takes the buffer (`whole`). They are made by `ops.permute_packed`, beside a permutation that is needed
anyway, and read where they lie: packing and unpacking take no pass over memory.

The bits of weights have no meaning as elements of the buffer: packed rows may be copied, sent and cut, not added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 16  # PackedRow of csrc/checks.h has the same


def width(hidden: int, rows: torch.dtype, weights: torch.dtype) -> int:
    """P, the elements of a packed row, of the type of the rows."""
    return _rounded_up(_weight_at(hidden, rows, weights) + weights.itemsize, _ALIGNMENT_BYTES) // rows.itemsize


def pack(rows_NH: Tensor, weights_N: Tensor) -> Tensor:
    """`whole` with gradients: who sends rows and weights gets one tensor to send."""
    packed_NP: Tensor = _Pack.apply(rows_NH, weights_N)  # type: ignore[no-untyped-call]
    return packed_NP


def unpack(packed_NP: Tensor, hidden: int, weights: torch.dtype) -> tuple[Tensor, Tensor]:
    """`views` with gradients: what has been sent is rows and weights again."""
    parts: tuple[Tensor, Tensor] = _Unpack.apply(packed_NP, hidden, weights)  # type: ignore[no-untyped-call]
    return parts


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, weights_N: Tensor) -> Tensor:
        ctx.parts = rows_NH.shape[1], weights_N.dtype
        return whole(rows_NH, weights_N)

    @staticmethod
    def backward(ctx: Any, grad_NP: Tensor) -> tuple[Tensor, Tensor]:
        return views(grad_NP, *ctx.parts)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_NP: Tensor, hidden: int, weights: torch.dtype) -> tuple[Tensor, Tensor]:
        return views(packed_NP, hidden, weights)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor, grad_N: Tensor) -> tuple[Tensor, None, None]:
        return whole(grad_NH, grad_N), None, None


def views(packed_NP: Tensor, hidden: int, weights: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows `[N, H]` and their weights `[N]` in a packed buffer."""
    column = _weight_at(hidden, packed_NP.dtype, weights) // weights.itemsize
    return packed_NP[:, :hidden], packed_NP.view(weights)[:, column]


def whole(rows_NH: Tensor, weights_N: Tensor) -> Tensor:
    """The packed buffer `[N, P]` of rows and weights: the one that they are views of, else a packed copy."""
    num_rows, hidden = rows_NH.shape
    pitch = width(hidden, rows_NH.dtype, weights_N.dtype)
    if num_rows == 0:
        return rows_NH.new_empty((0, pitch))
    if _lie_together(rows_NH, weights_N, pitch):
        return rows_NH.as_strided((num_rows, pitch), (pitch, 1))
    packed_NP = rows_NH.new_empty((num_rows, pitch))
    for part, values in zip(views(packed_NP, hidden, weights_N.dtype), (rows_NH, weights_N), strict=True):
        part.copy_(values)
    return packed_NP


def _lie_together(rows_NH: Tensor, weights_N: Tensor, pitch: int) -> bool:
    """Whether these are the two views of one packed buffer."""
    if rows_NH.untyped_storage()._cdata != weights_N.untyped_storage()._cdata:
        return False
    begin_bytes = rows_NH.storage_offset() * rows_NH.itemsize
    weight_at = weights_N.storage_offset() * weights_N.itemsize - begin_bytes
    strides = (*rows_NH.stride(), weights_N.stride(0) * weights_N.itemsize)
    is_weight = weight_at == _weight_at(rows_NH.shape[1], rows_NH.dtype, weights_N.dtype)
    return is_weight and strides == (pitch, 1, pitch * rows_NH.itemsize)


def _weight_at(hidden: int, rows: torch.dtype, weights: torch.dtype) -> int:
    """Where the weight begins, in bytes from the row's beginning."""
    return _rounded_up(hidden * rows.itemsize, weights.itemsize)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
