"""The digest of `checkpoint.digest` for tensors: the same numbers, computed where the tensor is.

In this host's memory the compiled op computes it, or numpy where the library is not built; on a device torch does.

int64 stands for the unsigned numbers of the definition: sums and products wrap in the same way, and a shift to the
right, which repeats the sign, is masked.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe import ops
from megatron_smartmoe.checkpoint.digest import MIX, MODULUS, POSITION, SHIFT, Piece, digest, rows_of, value_factor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_CHUNK_ELEMENTS = 2**22  # three arrays of this many 64-bit numbers: 100 MB of a GPU's memory while it digests
_LOW_BITS = 2 ** (64 - SHIFT) - 1


def digest_of_tensor(tensor: torch.Tensor, piece: Piece) -> int:
    """What a piece adds to its tensor's digest, see `checkpoint.digest.digest`; waits for the device.

    Args:
        tensor: the piece's elements in order, any shape, contiguous.
        piece: where they are.
    """
    if tensor.is_cuda:
        return int(start_digest(tensor, piece).item()) % MODULUS
    return digest(_bits(tensor).numpy(), _dtype(tensor), piece, ops.sum_of_rows if ops.is_compiled() else None)


def start_digest(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What `digest_of_tensor` returns, as an int64 on the tensor's device, enqueued there; the host does not wait."""
    return _digest(_bits(tensor), _dtype(tensor), piece)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


def _digest(bits: torch.Tensor, dtype: str, piece: Piece) -> torch.Tensor:
    """The sum as int64, on the device of `bits`."""
    assert bits.numel() == piece.num_elements, (bits.numel(), piece)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for rows in rows_of(piece):
        on_host = torch.from_numpy(rows.positions.astype(np.int64))
        positions = (on_host.pin_memory() if bits.is_cuda else on_host).to(bits.device, non_blocking=True)
        block = bits[rows.first : rows.first + rows.width * len(positions)].view(len(positions), rows.width)
        num_columns = min(rows.width, _CHUNK_ELEMENTS)
        num_rows = max(1, _CHUNK_ELEMENTS // num_columns)
        for column in range(0, rows.width, num_columns):
            chunk_columns = block[:, column : column + num_columns]
            column_N = torch.arange(1 + column, 1 + column + chunk_columns.shape[1], device=bits.device)
            for row in range(0, len(block), num_rows):
                at = positions[row : row + num_rows, None] + column_N
                total += _mixed_sum(chunk_columns[row : row + num_rows], at, dtype)
    return total


def _mixed_sum(bits: torch.Tensor, position_from_1: torch.Tensor, dtype: str) -> torch.Tensor:
    x = bits.to(torch.int64, copy=True)
    if bits.element_size() < 8:
        x.bitwise_and_(2 ** (8 * bits.element_size()) - 1)  # without the sign that int64 repeats
    x = x.mul_(_signed(value_factor(dtype))).add_(position_from_1.mul_(_signed(POSITION)))
    x.bitwise_xor_((x >> SHIFT).bitwise_and_(_LOW_BITS))
    x.mul_(_signed(MIX))
    x.bitwise_xor_((x >> SHIFT).bitwise_and_(_LOW_BITS))
    return x.sum()


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return number - MODULUS if number >= MODULUS // 2 else number
