"""A bias per group of rows: the loop of the CPU and the product of a GPU against torch's own."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe.ops.grouped_bias import bias_of_rows
from megatron_smartmoe.ops.grouped_linear import Groups
from tests.unit.ops.test_grouped_linear import COUNTS

WIDTH = 24


@pytest.mark.parametrize("on_device", [False, True], ids=["loop", "product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_values_and_gradients(counts: tuple[int, ...], dtype: torch.dtype, on_device: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(len(counts), 1, WIDTH, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(sum(counts), WIDTH, generator=generator).to(dtype)
    groups = Groups.of(gradient, torch.tensor(counts))
    if on_device:
        groups = Groups(ends_S=torch.tensor(counts).cumsum(0, dtype=torch.int32))
    found = bias_of_rows(bias, groups, sum(counts))
    assert torch.equal(found, bias.detach().squeeze(1).repeat_interleave(torch.tensor(counts), dim=0))
    found.backward(gradient)
    sums = [part.float().sum(0, keepdim=True) for part in gradient.split(counts)]
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.stack(sums).to(dtype), rtol=2e-2, atol=1e-5)
    assert not bias.grad[[count == 0 for count in counts]].any()


@pytest.mark.parametrize("on_device", [False, True], ids=["loop", "product"])
def test_factors(on_device: bool) -> None:
    """As autograd multiplies, and without rows that are kept."""
    counts, generator = (5, 0, 7, 1), torch.Generator().manual_seed(1)
    biases = [torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2)]
    factors = [torch.rand(13, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2)]
    gradient, kept = torch.randn(13, WIDTH, generator=generator), list[int]()
    groups = Groups.of(gradient, torch.tensor(counts))
    if on_device:
        groups = Groups(ends_S=torch.tensor(counts).cumsum(0, dtype=torch.int32))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = bias_of_rows(biases[0], groups, 13, factors[0])
    expected = bias_of_rows(biases[1], groups, 13) * factors[1].unsqueeze(1)
    found.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(found, expected)
    assert max(kept) == 4 * WIDTH
    for one, other in (biases, factors):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_the_loop_has_the_bits_of_torchs() -> None:
    rows = torch.randn(13, WIDTH, generator=torch.Generator().manual_seed(1))
    ours, torchs = torch.zeros(1, 1, WIDTH, requires_grad=True), torch.zeros(WIDTH, requires_grad=True)
    (bias_of_rows(ours, Groups.of(rows, torch.tensor([13])), 13) * rows).sum().backward()
    ((torch.zeros_like(rows) + torchs) * rows).sum().backward()
    assert ours.grad is not None
    assert torchs.grad is not None
    assert torch.equal(ours.grad.view(-1), torchs.grad)
