"""swiglu: what serves torch.ops.smartmoe, its twin, and Megatron's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

from megatron_smartmoe import ops
from megatron_smartmoe.ops import reference
from tests.unit.ops.activation_cases import Gated, assert_equal_to_rounding, gated_rows
from tests.unit.ops.test_dispatch import needs_library

KERNELS: Any = torch.ops.smartmoe


@needs_library
@given(gated_rows())
@settings(deadline=None, max_examples=150)
def test_kernels_and_twins_are_equal_to_rounding(case: Gated) -> None:
    found, expected = (
        (each.swiglu(case.inner_NG, case.probs_N), *each.swiglu_backward(case.grad_NF, case.inner_NG, case.probs_N))
        for each in (KERNELS, reference)
    )
    assert_equal_to_rounding(found, expected, case)


@pytest.mark.parametrize("function", [ops.swiglu, reference.swiglu])
def test_it_is_silu_times_linear_times_probability(function: Any) -> None:
    inner, probs = torch.tensor([[2.0, -1.0, 3.0, 5.0]]), torch.tensor([0.5])
    expected = F.silu(torch.tensor([2.0, -1.0])) * torch.tensor([3.0, 5.0]) * 0.5
    torch.testing.assert_close(function(inner, probs), expected[None])


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_it_is_megatrons_fused_function_to_rounding(num_rows: int) -> None:
    """In bfloat16, where Megatron's eager function rounds in between and this one does not."""
    torch.manual_seed(0)
    results = []
    inner, probs = torch.randn(num_rows, 96).bfloat16(), torch.rand(num_rows)
    grad = torch.randn(num_rows, 48).bfloat16()
    for ours in (True, False):
        inner_NG, probs_N = inner.clone().requires_grad_(), probs.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):  # Megatron's would be compiled, for each number of rows anew
            out = ops.swiglu(inner_NG, probs_N) if ours else weighted_bias_swiglu_impl(inner_NG, None, probs_N[:, None])
            out.backward(grad)
        results.append((out, inner_NG.grad, probs_N.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_gradients() -> None:
    torch.manual_seed(0)
    inner = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.swiglu, (inner, probs))


def test_opcheck() -> None:
    inner, probs = torch.randn(5, 6, requires_grad=True), torch.rand(5, requires_grad=True)
    torch.library.opcheck(KERNELS.swiglu.default, (inner, probs))
    torch.library.opcheck(KERNELS.swiglu_backward.default, (torch.randn(5, 3), inner.detach(), probs.detach()))


INNER, PROBS, GRAD = torch.zeros(3, 8), torch.ones(3), torch.zeros(3, 4)
ERRORS = [
    (
        "swiglu",
        (INNER.int(), PROBS),
        "inner_NG.dtype = int32: it must be float16, bfloat16, float32 or float64. Convert it with inner_NG.float()",
    ),
    (
        "swiglu",
        (INNER[:, :7], PROBS),
        "inner_NG.shape = [3, 7]: it must be [N, 2 F]. Pass the gate's columns, then those of the linear part",
    ),
    (
        "swiglu",
        (torch.zeros(1).expand(2**31, 2), PROBS),
        "inner_NG.shape = [2147483648, 2]: it must have at most 2147483647 rows. Split the micro-batch",
    ),
    (
        "swiglu",
        (INNER, PROBS.half()),
        "probs_N.dtype = float16: it must be float32, or float32 as inner_NG is. Convert it with probs_N.float()",
    ),
    (
        "swiglu",
        (INNER, PROBS[:2]),
        "probs_N.shape = [2]: it must be [N] = [3], as inner_NG has it. Pass a probability per row",
    ),
    (
        "swiglu_backward",
        (GRAD.half(), INNER, PROBS),
        "grad_NF.dtype = float16: it must be float32, as inner_NG is. Convert it with grad_NF.to(inner_NG.dtype)",
    ),
    (
        "swiglu_backward",
        (GRAD[:2], INNER, PROBS),
        "grad_NF.shape = [2, 4]: it must be [N, F] = [3, 4], as inner_NG has it. Pass the gradient of swiglu's result",
    ),
]


@pytest.mark.parametrize(("name", "args", "text"), ERRORS)
def test_errors_read_the_same_whatever_serves_the_op(name: str, args: tuple[object, ...], text: str) -> None:
    for module in (KERNELS, reference):
        with pytest.raises(RuntimeError) as caught:
            getattr(module, name)(*args)
        assert str(caught.value) == text
