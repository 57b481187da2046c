"""The expert histogram: what serves torch.ops.smartmoe, its twin, and a plain Python count must agree."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.ops import checks, fake, reference

INT32_MAX = 2**31 - 1
# for CI, where a missing library must not look like success
BUILD_IS_REQUIRED = os.environ.get("SMARTMOE_REQUIRE_BUILD") == "1"
needs_library = pytest.mark.skipif(
    not ops.backend().startswith("compiled") and not BUILD_IS_REQUIRED,
    reason="the compiled library is not built: python megatron_smartmoe/ops/_build.py",
)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_library), "reference"])
def histogram(request: pytest.FixtureRequest) -> Callable[[Tensor, int], Tensor]:
    return ops.expert_histogram if request.param == "compiled" else reference.expert_histogram


def count(ids: list[int], num_experts: int) -> list[int]:
    seen = Counter(ids)
    return [seen[e] for e in range(num_experts)]


@st.composite
def routed_ids(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor of ids and E: mostly experts, some dropped, some foreign, some that wrap into the range as int32."""
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    num_experts = draw(st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 256, checks.MAX_EXPERTS])))
    near = st.integers(-2, num_experts + 1)
    bound = INT32_MAX if dtype == torch.int32 else 2**63 - 1
    far = st.sampled_from([-bound - 1, bound, -INT32_MAX - 1, INT32_MAX])
    if dtype == torch.int64:
        far = far | st.integers(0, num_experts - 1).map(lambda e: e + 2**32)
    values = draw(st.lists(st.one_of(near, near, near, far), max_size=200))
    ids = torch.tensor(values, dtype=dtype)
    if draw(st.booleans()):
        ids = ids[: len(values) // 2 * 2].reshape(-1, 2)
    if draw(st.booleans()):
        ids = ids.t()  # not contiguous
    return ids[::2] if draw(st.booleans()) else ids, num_experts


@needs_library
@given(routed_ids())
@settings(deadline=None, max_examples=300)
def test_compiled_and_twin_count_alike(case: tuple[Tensor, int]) -> None:
    ids, num_experts = case
    expected = torch.tensor(count(ids.flatten().tolist(), num_experts))
    for got in (ops.expert_histogram(ids, num_experts), reference.expert_histogram(ids, num_experts)):
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0, 2), ()])
def test_empty_and_scalar(
    histogram: Callable[[Tensor, int], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    ids = torch.zeros(shape, dtype=dtype)
    assert histogram(ids, 3).tolist() == [ids.numel(), 0, 0]


def test_dropped_and_foreign_ids_are_not_counted(histogram: Callable[[Tensor, int], Tensor]) -> None:
    ids = torch.tensor([[0, -1], [3, 4], [-(2**63), 2**63 - 1], [2**32, 3]])
    assert histogram(ids, 4).tolist() == [1, 0, 0, 2]


def test_one_hot_expert_takes_all(histogram: Callable[[Tensor, int], Tensor]) -> None:
    ids = torch.full((100_003, 3), 17, dtype=torch.int32)
    counts = histogram(ids, 64)
    assert counts[17] == 300_009
    assert counts.sum() == 300_009


def test_ids_stay_as_they_were(histogram: Callable[[Tensor, int], Tensor]) -> None:
    ids = torch.arange(-3, 9).reshape(3, 4).t()
    before = ids.clone()
    histogram(ids, 5)
    assert torch.equal(ids, before)


ERRORS = [
    (torch.zeros(2), 4, "ids.dtype = float32: it must be int32 or int64. Convert it with ids.long()"),
    (
        torch.zeros(2, dtype=torch.bfloat16),
        4,
        "ids.dtype = bfloat16: it must be int32 or int64. Convert it with ids.long()",
    ),
    (torch.zeros(2).bool(), 4, "ids.dtype = bool: it must be int32 or int64. Convert it with ids.long()"),
    (torch.zeros(2).short(), 4, "ids.dtype = int16: it must be int32 or int64. Convert it with ids.long()"),
    (
        torch.zeros(2).long(),
        0,
        "num_experts = 0: it must be in 1..4096. Pass the number of logical experts of the layer",
    ),
    (
        torch.zeros(2).long(),
        -1,
        "num_experts = -1: it must be in 1..4096. Pass the number of logical experts of the layer",
    ),
    (
        torch.zeros(2).long(),
        4097,
        "num_experts = 4097: it must be in 1..4096. Pass the number of logical experts of the layer",
    ),
]


@pytest.mark.parametrize(("ids", "num_experts", "text"), ERRORS)
def test_errors_read_the_same_whatever_serves_the_op(ids: Tensor, num_experts: int, text: str) -> None:
    for function in (ops.expert_histogram, reference.expert_histogram, fake.expert_histogram):
        with pytest.raises(RuntimeError) as caught:
            function(ids, num_experts)
        assert str(caught.value) == text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 9, (13, 4), dtype=dtype)
    torch.library.opcheck(torch.ops.smartmoe.expert_histogram.default, (ids, 8))
    torch.library.opcheck(torch.ops.smartmoe.expert_histogram.default, (ids.t()[:, ::2], 8))


def test_meta_tensors_give_the_shape() -> None:
    counts = ops.expert_histogram(torch.empty(5, 2, dtype=torch.int32, device="meta"), 7)
    assert (counts.device.type, counts.shape, counts.dtype) == ("meta", (7,), torch.int64)
