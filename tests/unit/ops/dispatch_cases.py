"""Drawn inputs of dispatch_map, permute and unpermute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_smartmoe.ops import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Arguments of dispatch_map."""

    ids_TK: Tensor
    slot_of_E: Tensor
    num_slots: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Arguments of permute, unpermute and unpermute_backward; tensors may be views that are not contiguous."""

    rows_TK: Tensor
    num_rows: int
    x_TH: Tensor
    y_NH: Tensor
    weights_TK: Tensor


def maybe_strided(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values, sometimes in a buffer where neither rows nor elements are neighbours, or at an odd address."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if kind == 1 and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if kind == 2:
        buffer = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        return buffer.copy_(tensor)
    return tensor


@st.composite
def routings(draw: st.DrawFn, max_tokens: int = 60, max_slots: int = 2048) -> Routing:
    """Ids of which some are dropped or foreign or repeated, and a table with experts that live nowhere."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_tokens, num_choices = draw(st.integers(0, max_tokens)), draw(st.integers(1, 16))
    num_experts = draw(st.sampled_from([1, 2, 3, 8, 33, 300]))
    num_slots = draw(st.sampled_from([n for n in (1, 2, 8, 32, 257, 2048) if n <= max_slots]))
    dtypes = st.sampled_from([torch.int32, torch.int64])
    lowest = draw(st.sampled_from([0, -2]))  # 0: nothing is dropped
    ids = torch.randint(lowest, num_experts - lowest // 2, (num_tokens, num_choices), generator=generator)
    if draw(st.booleans()):
        ids[torch.rand(ids.shape, generator=generator) < 0.7] = 0  # a hot expert
    slots = torch.randint(lowest, num_slots - lowest // 2, (num_experts,), generator=generator)
    return Routing(
        ids_TK=maybe_strided(draw, ids.to(draw(dtypes))),
        slot_of_E=maybe_strided(draw, slots.to(draw(dtypes))),
        num_slots=num_slots,
    )


@st.composite
def permuted_rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, max_hidden: int = 600) -> Rows:
    """A map, sometimes with fewer or more rows than it needs, and rows, gradients and weights for it."""
    routing = draw(routings(max_tokens=24, max_slots=32))
    rows_TK, tokens_S = reference.dispatch_map(routing.ids_TK, routing.slot_of_E, routing.num_slots)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_rows = max(0, int(tokens_S.sum()) + draw(st.sampled_from([0, 0, 0, 3, 40, -2])))
    hidden = draw(st.one_of(st.sampled_from([8, 16, 64, 256, 520]), st.integers(0, max_hidden)))
    dtype = draw(st.sampled_from(dtypes))

    def rows(count: int) -> Tensor:
        return maybe_strided(draw, torch.randn(count, hidden, generator=generator).to(dtype))

    weight_dtype = dtype if dtype == torch.float64 or draw(st.booleans()) else torch.float32
    weights = torch.randn(rows_TK.shape, generator=generator).to(weight_dtype)
    return Rows(
        rows_TK=maybe_strided(draw, rows_TK),
        num_rows=num_rows,
        x_TH=rows(rows_TK.shape[0]),
        y_NH=rows(num_rows),
        weights_TK=maybe_strided(draw, weights),
    )


def assert_near(found: Tensor, expected: Tensor, rows: Rows) -> None:
    """Dot products of a row each: equal but for the order of the sum, and one rounding to the dtype of the weights."""
    assert found.dtype == expected.dtype
    epsilon = 1e-14 if rows.y_NH.dtype == torch.float64 and found.dtype == torch.float64 else 2e-6
    scale = float(rows.x_TH.shape[1]) ** 0.5 * 4 + 1
    rounding = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * rounding, atol=epsilon * scale * 8)
