"""What ranks add to the digests of a save makes the digests of the whole tensors, whichever rank holds what."""

from __future__ import annotations

import pickle

import pytest
import torch

from megatron_smartmoe.adapter.checkpoint.digests import LocalDigests, combined
from megatron_smartmoe.adapter.checkpoint.held import Held
from megatron_smartmoe.checkpoint.digest import MODULUS, Piece, digest
from megatron_smartmoe.checkpoint.manifest import ParameterDigest

SHAPE = (3, 4)
NORM, EXPERTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(48.0).view(4, *SHAPE)


def held(name: str, expert: int | None, piece: Piece, tensor: torch.Tensor | None) -> Held:
    return Held(name=name, kind="weight", dtype="float32", expert=expert, piece=piece, tensor=tensor)


def part_of(rank: int, *, stage: str) -> LocalDigests:
    """Half of a norm's elements, and two of four experts; the names of the other two."""
    half = Piece(shape=SHAPE, offsets=(0, 0), sizes=SHAPE, start=6 * rank, stop=6 * rank + 6)
    parts = [held("tied", None, half, NORM.view(-1)[6 * rank : 6 * rank + 6])]
    for expert in range(4):
        own = EXPERTS[expert] if expert // 2 == rank else None
        parts.append(held(f"{stage}.experts", expert, Piece.whole(SHAPE), own))
    return LocalDigests(parts, 4)


def test_pieces_on_four_ranks_of_two_stages() -> None:
    locals_ = [part_of(rank, stage=stage) for stage in ("first", "second") for rank in (0, 1)]
    for local in locals_:
        local.compute()
        local.wait()
    parts = pickle.loads(pickle.dumps([local.part() for local in locals_]))  # as they are sent
    norm = 2 * digest(NORM.numpy(), "float32", Piece.whole(SHAPE)) % MODULUS  # both stages add it
    experts = tuple(digest(expert.numpy(), "float32", Piece.whole(SHAPE)) for expert in EXPERTS)
    expected = {"first.experts": experts, "second.experts": experts, "tied": (norm,)}
    assert combined(parts) == tuple(
        ParameterDigest(name=name, kind="weight", dtype="float32", shape=SHAPE, digests=digests)
        for name, digests in expected.items()
    )


def test_who_waits_goes_on_when_the_tensors_were_read_whatever_came_of_it() -> None:
    wrong = held("norm", None, Piece.whole((5,)), NORM)  # 12 elements, and not 5
    local = LocalDigests([wrong], 4)
    with pytest.raises(AssertionError):
        local.compute()
    local.wait()
