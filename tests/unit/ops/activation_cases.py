"""Drawn inputs of swiglu."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.dispatch_cases import DTYPES, maybe_strided


@dataclass(frozen=True, kw_only=True)
class Gated:
    """Arguments of swiglu and the gradient of its result; tensors may be views that are not contiguous."""

    inner_NG: Tensor
    probs_N: Tensor
    grad_NF: Tensor


@st.composite
def gated_rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, max_ffn: int = 300) -> Gated:
    """No row or some, with gates far out on both sides of the sigmoid."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_rows = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 40]))
    ffn = draw(st.one_of(st.sampled_from([8, 16, 64, 256, 264]), st.integers(0, max_ffn)))
    dtype = draw(st.sampled_from(dtypes))
    inner = torch.randn(num_rows, 2 * ffn, generator=generator) * draw(st.sampled_from([1.0, 8.0, 60.0]))
    prob_dtype = dtype if dtype == torch.float64 or draw(st.booleans()) else torch.float32
    return Gated(
        inner_NG=maybe_strided(draw, inner.to(dtype)),
        probs_N=maybe_strided(draw, torch.rand(num_rows, generator=generator).to(prob_dtype)),
        grad_NF=maybe_strided(draw, torch.randn(num_rows, ffn, generator=generator).to(dtype)),
    )


def assert_equal_to_rounding(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], case: Gated) -> None:
    """Result and gradients of inner_NG and probs_N: equal but for exponentials, one rounding, and a sum's order."""
    scale = float(case.inner_NG.abs().amax()) if case.inner_NG.numel() else 1.0
    computed = 1e-13 if case.inner_NG.dtype == torch.float64 else 3e-6
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == other.dtype
        rtol = max(computed, 2 * torch.finfo(one.dtype).eps)
        torch.testing.assert_close(one, other, rtol=rtol, atol=computed * max(1.0, scale) ** 2)
    dots = (case.inner_NG.shape[1] / 2 + 1) * max(1.0, scale) ** 2
    rtol = 2 * torch.finfo(found[2].dtype).eps
    torch.testing.assert_close(found[2], expected[2], rtol=rtol, atol=computed * dots, check_dtype=True)
