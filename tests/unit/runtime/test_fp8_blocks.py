"""Weights of replicas as fp8 with a scale per block: what the GEMM of a blockwise recipe reads of them."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.runtime.replicas.fp8_blocks import (
    BLOCK,
    PackedSlots,
    can_pack,
    dequantize,
    message_bytes,
    pack,
    quantize,
    unpack,
)

SHAPES = [(256, 128), (130, 200), (64, 64), (1, 300)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values of many sizes, so that blocks have subnormals, and a block of zeros where there is a second one."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp() ** 4
    found[:, BLOCK : 2 * BLOCK] = 0
    return found.bfloat16()


def test_values_by_hand() -> None:
    """The largest value is 3: 448 / 3 = 149.3, so the scale is 128; 384 and 128 x 0.3 = 38.4, rounded to 40."""
    values, scales = quantize(torch.tensor([[3.0, 0.3], [0.0, -3.0]]).bfloat16())
    assert values.float().tolist() == [[384.0, 40.0], [0.0, -384.0]]
    assert scales.tolist() == [[1 / 128]]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_value_is_beyond_the_largest_and_no_block_is_coarser_than_it_must_be(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    values, scales = quantize(weight)
    assert values.float().isfinite().all()
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]
    assert torch.equal(dequantize(values, scales).float(), values.float() * spread)  # bf16 has them all
    for row in range(0, shape[0], BLOCK):
        for column in range(0, shape[1], BLOCK):
            block = weight[row : row + BLOCK, column : column + BLOCK].float().abs().max()
            scale = 1 / scales[row // BLOCK, column // BLOCK]
            assert block == 0 or 224 < block * scale <= 448
    assert (dequantize(values, scales).float() - weight.float()).abs().max() <= weight.float().abs().max() / 16


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_again_the_numbers_are_the_same(shape: tuple[int, int], seed: int) -> None:
    """What a replica's recipe makes of the weights that arrive is what its home's makes of the weights there."""
    values, scales = quantize(matrix(*shape, seed))
    arrived = dequantize(values, scales)
    again, scales_again = quantize(arrived)
    assert torch.equal(dequantize(again, scales_again), arrived)
    assert set((scales / scales_again).flatten().tolist()) <= {1.0, 2.0}


def test_a_scale_may_grow_and_the_numbers_stay() -> None:
    """230 is rounded to 224, which leaves room for twice the scale."""
    values, scales = quantize(torch.tensor([[230.0, 1.0]]).bfloat16())
    again, scales_again = quantize(dequantize(values, scales))
    assert (values.float()[0, 0], again.float()[0, 0]) == (224.0, 448.0)
    assert scales_again == scales / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_has_all_of_it(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    message, found = pack(weight), torch.full(shape, torch.nan, dtype=torch.bfloat16)
    assert message.shape == (message_bytes(*shape),)
    unpack(message, found)
    assert torch.equal(found, dequantize(*quantize(weight)))


def test_bytes_are_those_of_the_price() -> None:
    expert = ExpertShape(hidden=512, ffn=1024, gated=True, fp8_weights=True)
    assert expert.sent_weight_bytes == message_bytes(2048, 512) + message_bytes(512, 1024)
    plain = ExpertShape(hidden=512, ffn=1024, gated=True)
    assert expert.sent_weight_bytes == pytest.approx(plain.sent_weight_bytes / 2, rel=1e-3)
    assert plain.sent_weight_bytes == plain.weight_bytes


def test_slots_are_packed_once_and_biases_not_at_all() -> None:
    weight = torch.stack([matrix(64, 64, seed) for seed in range(2)])
    packed = PackedSlots(weight)
    assert packed[1] is packed[1]
    assert torch.equal(packed[1], pack(weight[1]))
    assert can_pack(weight)
    assert not can_pack(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 64, 64))
