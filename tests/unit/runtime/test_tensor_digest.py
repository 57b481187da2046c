"""The digest of a tensor on a device: the numbers of the numpy definition, for every type and way of cutting."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe.checkpoint.digest import MODULUS, Piece, combine, digest
from megatron_smartmoe.runtime import tensor_digest
from megatron_smartmoe.runtime.tensor_digest import digest_of_tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def on_device(tensor: torch.Tensor, piece: Piece) -> int:
    """What `digest_of_tensor` computes on a device; a CPU computes the same int64 arithmetic."""
    bits = tensor.contiguous().view(-1).view(tensor_digest._BITS[tensor.element_size()])
    before = bits.clone()
    found = int(tensor_digest._digest(bits, str(tensor.dtype).removeprefix("torch."), piece)) % MODULUS
    assert torch.equal(bits, before)  # the tensor itself is left alone
    return found


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_device_and_host_compute_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_digest, "_CHUNK_ELEMENTS", 16)  # several chunks of rows, and of columns
    numbers = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)) * 1e3
    tensor = numbers.to(dtype)
    piece = Piece(shape=(6, 10, 8), offsets=(0, 5, 0), sizes=(6, 5, 8))
    assert on_device(tensor, piece) == digest_of_tensor(tensor, piece)
    for start, stop in ((0, 7), (3, 100), (39, 40)):
        part = Piece(shape=(6, 10, 8), offsets=(0, 5, 0), sizes=(6, 5, 8), start=start, stop=stop)
        assert on_device(tensor.view(-1)[start:stop], part) == digest_of_tensor(tensor.view(-1)[start:stop], part)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_without_the_compiled_library_they_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = (torch.randn(7, 33, 65, generator=torch.Generator().manual_seed(3)) * 1e3).to(dtype)
    pieces = [Piece(shape=(9, 40, 65), offsets=(1, 2, 0), sizes=(7, 33, 65), start=n, stop=15000 - n) for n in (0, 70)]
    found = [digest_of_tensor(tensor.view(-1)[piece.start : piece.stop], piece) for piece in pieces]
    monkeypatch.setattr(tensor_digest.ops, "is_compiled", lambda: False)
    assert found == [digest_of_tensor(tensor.view(-1)[piece.start : piece.stop], piece) for piece in pieces]


def test_pieces_add_up_to_the_whole_and_bfloat16_is_its_float32() -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = digest_of_tensor(tensor, Piece.whole((4, 6)))
    left = digest_of_tensor(tensor[:, :3], Piece(shape=(4, 6), offsets=(0, 0), sizes=(4, 3)))
    right = digest_of_tensor(tensor[:, 3:], Piece(shape=(4, 6), offsets=(0, 3), sizes=(4, 3)))
    assert combine([left, right]) == whole == digest_of_tensor(tensor.float(), Piece.whole((4, 6)))
    assert whole == digest(tensor.float().numpy(), "float32", Piece.whole((4, 6)))
