"""Delayed weight gradients are those of the backward pass, bit for bit, and are passed on once."""

from __future__ import annotations

import pytest
import torch

from megatron_smartmoe.adapter.moe.delayed_gradients import DelayedGradients
from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_backward_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 16, dtype=dtype)
    weight = torch.randn(3, 24, 16, dtype=dtype)
    groups = Groups.of(rows, torch.tensor([7, 0, 13]))
    gradient, calls = torch.randn(20, 24, dtype=dtype), []
    delayed = DelayedGradients()
    delayed.call_after(lambda: calls.append(1))
    found = {}
    for kind, taker in (("at once", None), ("delayed", delayed.keep)):
        inputs, parameter = rows.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        output = grouped_linear(inputs, parameter, groups, taker)
        output.backward(gradient)
        if kind == "delayed":
            assert parameter.grad is None
            delayed.compute()
            delayed.compute()  # Megatron calls it after every backward pass, also of layers that delayed nothing
        assert parameter.grad is not None
        assert inputs.grad is not None
        found[kind] = (output.detach(), inputs.grad, parameter.grad)
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))
    assert calls == [1]
