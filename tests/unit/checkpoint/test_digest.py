"""The digest: the same for any partition and order, and different for anything that can go wrong with the numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_smartmoe.checkpoint.digest import MIX, MODULUS, POSITION, VALUE, Piece, combine, digest, rows_of


def one_by_one(elements: NDArray[Any], piece: Piece) -> int:
    """The definition, in Python's own numbers."""
    positions = np.arange(math.prod(piece.shape)).reshape(piece.shape)
    inside = positions[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))]
    total = 0
    bits = elements.reshape(-1).view(f"u{elements.dtype.itemsize}").tolist()
    for position, value in zip(inside.reshape(-1)[piece.start : piece.end].tolist(), bits, strict=True):
        x = ((position + 1) * POSITION + value * VALUE) % MODULUS
        x = (x ^ (x >> 32)) * MIX % MODULUS
        total += x ^ (x >> 32)
    return total % MODULUS


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    start = draw(st.integers(0, math.prod(sizes)))
    return Piece(
        shape=shape, offsets=offsets, sizes=sizes, start=start, stop=draw(st.integers(start, math.prod(sizes)))
    )


@given(pieces(), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_any_piece_follows_the_definition(piece: Piece, seed: int) -> None:
    elements = np.random.default_rng(seed).standard_normal(piece.num_elements).astype(np.float32)
    assert digest(elements, "float32", piece) == one_by_one(elements, piece)
    assert sum(rows.width * len(rows.positions) for rows in rows_of(piece)) == piece.num_elements


def test_a_large_tensor_follows_the_definition() -> None:
    """Longer than a chunk, in rows that are longer and shorter than one."""
    elements = np.random.default_rng(1).standard_normal(70_000).astype(np.float32)
    for sizes in ((1, 70_000), (70, 1_000), (7_000, 10)):
        piece = Piece(shape=(sizes[0] + 3, sizes[1] + 5), offsets=(2, 4), sizes=sizes)
        assert digest(elements, "float32", piece) == one_by_one(elements, piece)


MATRIX = np.random.default_rng(2).standard_normal((24, 16)).astype(np.float32)
WHOLE = digest(MATRIX, "float32", Piece.whole(MATRIX.shape))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_it_does_not_depend_on_tensor_parallelism_and_flat_shards(axis: int, parts: int) -> None:
    """Each shard is cut again into uneven ranges, as the distributed optimizer does."""
    sums = []
    for number, shard in enumerate(np.split(MATRIX, parts, axis)):
        offsets = (number * shard.shape[0], 0) if axis == 0 else (0, number * shard.shape[1])
        cuts = [0, 5, 5, 17, shard.size]
        for start, stop in itertools.pairwise(cuts):
            piece = Piece(shape=MATRIX.shape, offsets=offsets, sizes=shard.shape, start=start, stop=stop)
            sums.append(digest(shard.reshape(-1)[start:stop], "float32", piece))
    assert combine(reversed(sums)) == WHOLE


def test_gated_rows_are_placed_by_halves() -> None:
    """A rank holds gate rows and then linear rows; in the whole, all gate rows come first."""
    sums = []
    for rank in range(2):
        for half in range(2):
            rows = MATRIX[12 * half + 6 * rank :][:6]
            piece = Piece(shape=MATRIX.shape, offsets=(12 * half + 6 * rank, 0), sizes=rows.shape)
            sums.append(digest(rows, "float32", piece))
    assert combine(sums) == WHOLE


def test_equal_numbers_in_bfloat16_and_float32() -> None:
    narrow = torch.from_numpy(MATRIX).bfloat16()
    bits = narrow.view(torch.int16).numpy()
    piece = Piece.whole(MATRIX.shape)
    assert digest(bits, "bfloat16", piece) == digest(narrow.float().numpy(), "float32", piece) != WHOLE


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8"])
def test_other_types_give_their_own_bits(dtype: str) -> None:
    elements = (MATRIX * 10).astype(dtype)
    assert digest(elements, dtype, Piece.whole(MATRIX.shape)) == one_by_one(elements, Piece.whole(MATRIX.shape))


def test_a_twin_on_int64_tensors() -> None:
    """What a rank computes on its device: wrapping multiplications, masked shifts, xor."""

    def signed(value: int) -> int:
        return value - MODULUS if value >= MODULUS // 2 else value

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return (x >> 32) & 0xFFFFFFFF

    bits = torch.from_numpy(MATRIX).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    positions = torch.arange(1, bits.numel() + 1).reshape(bits.shape)
    x = positions * signed(POSITION) + bits * signed(VALUE)
    x = (x ^ shifted(x)) * signed(MIX)
    assert int((x ^ shifted(x)).sum()) % MODULUS == WHOLE


def test_every_single_bit_is_noticed() -> None:
    """Not by luck: each step of the mix maps different numbers to different ones."""
    for element in range(0, MATRIX.size, 7):
        for bit in range(32):
            damaged = MATRIX.copy()
            damaged.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
            assert digest(damaged, "float32", Piece.whole(MATRIX.shape)) != WHOLE


def swap_two(values: NDArray[Any], rng: np.random.Generator) -> None:
    i, j = rng.choice(values.size, 2, replace=False)
    values[[i, j]] = values[[j, i]]


def negate_two(values: NDArray[Any], rng: np.random.Generator) -> None:
    values[rng.choice(values.size, 2, replace=False)] *= -1


def shift_by_one(values: NDArray[Any], rng: np.random.Generator) -> None:
    start = rng.integers(0, values.size - 2)
    values[start:-1] = values[start + 1 :].copy()
    values[-1] = 0


def zero_the_end(values: NDArray[Any], rng: np.random.Generator) -> None:
    values[rng.integers(0, values.size - 1) :] = 0


def next_float(values: NDArray[Any], rng: np.random.Generator) -> None:
    where = rng.choice(values.size, 8, replace=False)
    values[where] = np.nextafter(values[where], np.float32(np.inf))


def exchange_halves(values: NDArray[Any], rng: np.random.Generator) -> None:
    rows = rng.choice(8, 2, replace=False)
    matrix = values.reshape(8, -1)
    matrix[rows] = matrix[rows[::-1]]


DAMAGES = [swap_two, negate_two, shift_by_one, zero_the_end, next_float, exchange_halves]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shape", [(512,), (8, 64)])
def test_changes_of_many_elements_go_unnoticed_as_rarely_as_chance_has_it(
    damage: Callable[[NDArray[Any], np.random.Generator], None], shape: tuple[int, ...]
) -> None:
    """One in 2^64 cannot be seen; one in 2^8 of every byte of the digest can: each byte stays the same that often."""
    rng, trials = np.random.default_rng(3), 2_000
    same = np.zeros(8, np.int64)
    for _ in range(trials):
        values = rng.standard_normal(math.prod(shape)).astype(np.float32)
        before = digest(values, "float32", Piece.whole(shape))
        damage(values, rng)
        after = digest(values, "float32", Piece.whole(shape))
        assert before != after
        pairs = zip(before.to_bytes(8, "little"), after.to_bytes(8, "little"), strict=True)
        same += np.array([a == b for a, b in pairs])
    expected = trials / 256
    assert np.all(same < expected + 6 * math.sqrt(expected)), same  # six standard deviations


def test_equal_numbers_elsewhere_are_different() -> None:
    """Also zeros: a lost piece is not a piece of zeros."""
    zeros = np.zeros(8, np.float32)
    digests = {digest(zeros[:n], "float32", Piece(shape=(8,), offsets=(0,), sizes=(n,))) for n in range(9)}
    assert len(digests) == 9
