"""A digest of a tensor's numbers that does not depend on how the tensor was cut, ordered or stored.

Each element adds one 64-bit number, made of its position in the logical tensor and of its bits:

    x = (position + 1) * POSITION + bits * VALUE
    x = x xor (x >> 32)
    x = x * MIX
    x = x xor (x >> 32)

all modulo 2^64 with shifts that fill in zeros, and the digest is the sum modulo 2^64. A sum has no order, so ranks
digest the pieces that they hold (expert, pipeline and tensor parallel shards, flat shards of the optimizer, wherever
experts live), and one sum over the ranks is the digest of the whole: no weight is gathered, and a checkpoint that was
saved at other sizes or in another format has the same one. It takes wrapping multiplications, shifts and xor only, so a
twin on int64 tensors is as fast as memory (`>>` of int64 fills in the sign: mask its result with 2^32 - 1).

What it finds: each step above maps different x to different x, so a change of one element always changes the digest.
For changes of several elements the sum acts like a random number: one in 2^64 goes unnoticed, by accident; it is no
protection against somebody who looks for one. tests/unit/checkpoint/test_digest.py measures the rate on parts of the 64
bits, for swapped, shifted, zeroed, negated and rounded elements; it fails without either of the two xor.

The logical tensor of a record is one parameter of one layer (of one expert, for experts), in row-major order, as
Megatron's checkpoints order it: gate rows of a gated layer before linear rows, whatever tensor parallelism cuts. The
bits of float32 and bfloat16 are those of the number as float32, so that equal numbers have equal digests; other types
give their own bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.spec.readers.torch_save import ITEM_BYTES

POSITION = 0x9E3779B97F4A7C15
VALUE = 0xBF58476D1CE4E5B9
MIX = 0x94D049BB133111EB
SHIFT = 32
MODULUS = 2**64

WEIGHT, MAIN_WEIGHT, EXP_AVG, EXP_AVG_SQ = KINDS = ("weight", "main_weight", "exp_avg", "exp_avg_sq")

# The sum of the mixed elements of rows: their bits one after the other, the position of each row's first element, the
# width of a row, and what the bits are multiplied with.
type SumOfRows = Callable[[NDArray[Any], NDArray[np.int64], int, int], int]

_CHUNK_ELEMENTS = 2**15  # two arrays of this many 64-bit numbers stay in a core's own cache


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a logical tensor: a box of it, or a range of the box's elements in the box's own row-major order.

    Attributes:
        shape: of the logical tensor.
        offsets: first index of the box in each axis.
        sizes: of the box in each axis.
        start: first element of the range.
        stop: end of the range; None for the end of the box.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        fits = all(
            o >= 0 and n >= 0 and o + n <= s for s, o, n in zip(self.shape, self.offsets, self.sizes, strict=True)
        )
        assert fits, self
        assert 0 <= self.start <= self.end <= math.prod(self.sizes), self

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Piece:
        """All of a tensor."""
        return cls(shape=tuple(shape), offsets=(0,) * len(shape), sizes=tuple(shape))

    @property
    def end(self) -> int:
        """End of the range, as a number."""
        return math.prod(self.sizes) if self.stop is None else self.stop

    @property
    def num_elements(self) -> int:
        """Number of elements of the range."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Elements of a piece that lie in rows: `width` elements follow each other in the piece and in the tensor.

    Attributes:
        first: index in the piece of the first element of the first row; row n starts at `first + n * width`.
        positions: position in the logical tensor of the first element of each row, int64 `[rows]`.
        width: elements of a row.
    """

    first: int
    positions: NDArray[np.int64]
    width: int


def rows_of(piece: Piece) -> Iterator[Rows]:
    """The rows of a piece, in its order: at most a part of a row, whole rows, and again a part of a row."""
    if piece.num_elements == 0:
        return
    strides = [math.prod(piece.shape[axis + 1 :]) for axis in range(len(piece.shape))]
    # Step 1: the last axes of which the box has everything, and the one before them, make one row.
    axis = len(piece.shape)
    while axis > 0 and piece.sizes[axis - 1] == piece.shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)
    width = math.prod(piece.sizes[axis:])
    # Step 2: where the rows of the box start that the range touches.
    low, high = piece.start // width, -(-piece.end // width)
    index, starts = np.arange(low, high, dtype=np.int64), np.zeros(high - low, np.int64)
    for outer in reversed(range(axis)):
        index, at = np.divmod(index, piece.sizes[outer])
        starts += (at + piece.offsets[outer]) * strides[outer]
    starts += sum(piece.offsets[inner] * strides[inner] for inner in range(axis, len(piece.shape)))
    # Step 3: the first and the last of them may be cut.
    head, tail = piece.start - low * width, high * width - piece.end
    if high - low == 1:
        yield Rows(first=0, positions=starts + head, width=width - head - tail)
        return
    if head:
        yield Rows(first=0, positions=starts[:1] + head, width=width - head)
    whole = starts[bool(head) : len(starts) - bool(tail)]
    if len(whole):
        yield Rows(first=(width - head) % width, positions=whole, width=width)
    if tail:
        yield Rows(first=piece.num_elements - (width - tail), positions=starts[-1:], width=width - tail)


def digest(elements: NDArray[Any], dtype: str, piece: Piece, sum_of_rows: SumOfRows | None = None) -> int:
    """The sum that a piece adds to its tensor's digest.

    Args:
        elements: the piece's elements in order, any shape; bfloat16 and the 8-bit floats as unsigned integers.
        dtype: torch's name of their type, without "torch.".
        piece: where they are.
        sum_of_rows: a faster one than numpy's; None for numpy's.
    """
    bits = as_bits(elements, dtype)
    assert bits.size == piece.num_elements, (bits.size, piece)
    factor, total, sum_of = value_factor(dtype), 0, sum_of_rows or _sum_of_rows
    for rows in rows_of(piece):
        block = bits[rows.first : rows.first + rows.width * len(rows.positions)]
        total += sum_of(block, rows.positions, rows.width, factor)
    return total % MODULUS


def combine(digests: Iterable[int]) -> int:
    """The digest of a tensor from those of the pieces that it was cut into."""
    return sum(digests) % MODULUS


def value_factor(dtype: str) -> int:
    """What the bits of an element are multiplied with: a bfloat16 is the upper half of a float32."""
    return VALUE * 2**16 % MODULUS if dtype == "bfloat16" else VALUE


def as_bits(elements: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Elements as a flat array of unsigned integers of their size."""
    size = ITEM_BYTES[dtype]
    assert elements.dtype.itemsize == size, (elements.dtype, dtype)
    return np.ascontiguousarray(elements).reshape(-1).view(f"u{size}")


def _sum_of_rows(bits: NDArray[Any], positions: NDArray[np.int64], width: int, factor: int) -> int:
    """The sum of the mixed elements of rows."""
    return sum(_sums(bits.reshape(-1, width), positions, factor))


def _sums(block: NDArray[Any], positions: NDArray[np.int64], factor: int) -> Iterator[int]:
    """The same by chunk, of a block `[rows, width]`."""
    width = block.shape[1]
    num_columns = min(width, _CHUNK_ELEMENTS)
    num_rows = max(1, _CHUNK_ELEMENTS // num_columns)
    column_terms = np.arange(1, num_columns + 1, dtype=np.uint64) * np.uint64(POSITION)
    row_terms = positions.astype(np.uint64) * np.uint64(POSITION)
    x = np.empty((num_rows, num_columns), np.uint64)
    shifted = np.empty_like(x)
    for column in range(0, width, num_columns):
        skipped = np.uint64(column * POSITION % MODULUS)
        for row in range(0, len(block), num_rows):
            chunk = block[row : row + num_rows, column : column + num_columns]
            at = tuple(slice(size) for size in chunk.shape)
            y, z = x[at], shifted[at]
            np.multiply(chunk, np.uint64(factor), out=y, dtype=np.uint64, casting="unsafe")
            y += (row_terms[row : row + num_rows] + skipped)[:, None]
            y += column_terms[None, : chunk.shape[1]]
            yield _mixed_sum(y, z)


def _mixed_sum(x: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> int:
    np.right_shift(x, np.uint64(SHIFT), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.multiply(x, np.uint64(MIX), out=x)
    np.right_shift(x, np.uint64(SHIFT), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    return int(np.add.reduce(x, axis=None, dtype=np.uint64))
