"""A weight as the GEMM of a blockwise fp8 recipe reads it: e4m3 values and a scale for each block of 128 x 128.

A replica's weights travel so where experts are computed by that recipe: half the bytes of bf16. The rank that receives
them turns them back into bf16, without rounding: e4m3 has fewer bits, and scales are powers of two. The recipe then
quantizes what it gets to the same numbers as at home, although a block's scale may be twice as large: its largest value
may have been rounded down to 224, half of the largest that e4m3 has, and the values are doubled with it. So the GEMM of
a replica has the bits that it would have if bf16 had travelled, whatever the recipe does with its values inside.

That holds for powers of two alone. Scales of a whole tensor (`tensorwise`) are any number, and MX has other scales for
the transposed weight of the backward pass: there bf16 travels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_smartmoe.runtime.replicas.per_slot import SlotWeight

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ALIGNMENT_BYTES = 16  # of the messages of slots that lie behind each other
_SCALE_BYTES = 4
_LEAST = 1e-30  # a block whose values are all smaller has the scale of this one; 448 over less is no float32


def can_pack(weight: SlotWeight) -> bool:
    """Whether the slots of a weight are matrices in bf16; biases travel as they are."""
    return weight.dtype == torch.bfloat16 and len(weight.shape) == 3


def message_bytes(rows: int, columns: int) -> int:
    """Bytes of a packed matrix: scales, values, and what fills the message up."""
    size = rows * columns + _SCALE_BYTES * _blocks(rows) * _blocks(columns)
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class PackedSlots:
    """The slots of a weight as messages, each made when it is first asked for.

    Args:
        weight: `[S, rows, columns]`, which does not change while these messages are used.
    """

    def __init__(self, weight: SlotWeight) -> None:
        self._weight, self._messages = weight, dict[int, Tensor]()

    def __getitem__(self, slot: int) -> Tensor:
        if slot not in self._messages:
            self._messages[slot] = pack(self._weight[slot])
        return self._messages[slot]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device


def quantize(weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Values in e4m3, and what each block's values are to be multiplied by, float32.

    The largest scale that is a power of two and lets no value of the block grow beyond e4m3's largest.
    """
    blocks = _as_blocks(weight_MK.float())
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    mantissa, exponent = torch.frexp(_LARGEST / largest.clamp(min=_LEAST))
    scale = torch.where(largest > 0, torch.ldexp(torch.full_like(mantissa, 0.5), exponent), 1.0)
    values = (blocks * scale).to(torch.float8_e4m3fn)
    return _as_matrix(values, weight_MK.shape), (1 / scale).flatten(1, 3).contiguous()


def dequantize(values_MK: Tensor, scales: Tensor) -> Tensor:
    """The numbers that values and scales stand for, in bf16, which has them all."""
    blocks = _as_blocks(values_MK.to(torch.bfloat16))
    return _as_matrix(blocks * scales[:, None, :, None].to(torch.bfloat16), values_MK.shape)


@torch.no_grad()
def pack(weight_MK: Tensor) -> Tensor:
    """A matrix in bf16 as a message, uint8 `[message_bytes]`."""
    values_MK, scales = quantize(weight_MK)
    message = torch.zeros(message_bytes(*weight_MK.shape), dtype=torch.uint8, device=weight_MK.device)
    first = scales.numel() * _SCALE_BYTES
    message[:first] = scales.view(-1).view(torch.uint8)
    message[first : first + values_MK.numel()] = values_MK.reshape(-1).view(torch.uint8)
    return message


@torch.no_grad()
def unpack(message: Tensor, into_MK: Tensor) -> None:
    """Write the matrix of a message, in bf16."""
    rows, columns = into_MK.shape
    first = _blocks(rows) * _blocks(columns) * _SCALE_BYTES
    scales = message[:first].view(torch.float32).view(_blocks(rows), _blocks(columns))
    values_MK = message[first : first + rows * columns].view(torch.float8_e4m3fn).view(rows, columns)
    into_MK.copy_(dequantize(values_MK, scales))


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _as_blocks(matrix_MK: Tensor) -> Tensor:
    """`[blocks of rows, rows, blocks of columns, columns]`, with zeros around a matrix that has no whole blocks."""
    rows, columns = matrix_MK.shape
    padded = F.pad(matrix_MK, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(_blocks(rows), BLOCK, _blocks(columns), BLOCK)


def _as_matrix(blocks: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = shape
    return blocks.reshape(_blocks(rows) * BLOCK, -1)[:rows, :columns]
