"""grouped_linear on the CPU: the loop over groups against torch's own, and a library that leaves garbage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_smartmoe import ops  # noqa: F401  # registers the ops
from megatron_smartmoe.ops import grouped_linear as module
from megatron_smartmoe.ops import reference
from megatron_smartmoe.ops.grouped_linear import (
    Groups,
    grouped_linear,
    library_has_kernel,
    recomputed_linear,
    wants_counts_on_device,
)

KERNELS: Any = torch.ops.smartmoe
COUNTS = ((5, 0, 7, 1), (0, 0, 0, 0), (0, 3), (4,), (2, 0))


def inputs(counts: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(dtype).requires_grad_()
    return rows, weight, torch.randn(sum(counts), 24, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_loop_has_the_bits_of_torchs(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    results = []
    for ours in (True, False):
        rows, weight, grad = inputs(counts, dtype)
        if ours:
            out = grouped_linear(rows, weight, Groups.of(rows, torch.tensor(counts)))
        else:
            ends = torch.tensor(counts).cumsum(0).int()
            out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        out.backward(grad)
        results.append((out, rows.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert weight.grad is not None
    assert weight.grad.is_contiguous()


def test_only_what_needs_a_gradient_is_multiplied() -> None:
    rows, weight, grad = inputs((5, 0, 7, 1), torch.float32)
    grouped_linear(rows.detach(), weight, Groups.of(rows, torch.tensor((5, 0, 7, 1)))).backward(grad)
    assert rows.grad is None
    assert weight.grad is not None


def garbage_in_empty_groups(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """A grouped GEMM that does not write the weight gradient of a group without rows."""
    out: Tensor = torch.ops.aten._grouped_mm(left, right, offs)
    if left.dim() == 2 and right.dim() == 2:
        out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = float("nan")
    return out


@pytest.mark.parametrize("counts", COUNTS)
def test_groups_without_rows_have_no_gradient_whatever_the_library_leaves(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight, grad = inputs(counts, torch.bfloat16)
    grouped_linear(rows, weight, Groups.of(rows, torch.tensor(counts))).backward(grad)
    expected, weight.grad = weight.grad, None
    monkeypatch.setattr(module, "wants_counts_on_device", lambda tensor: True)
    monkeypatch.setattr(F, "grouped_mm", garbage_in_empty_groups)
    for cleared in (False, True):
        monkeypatch.setattr(module, "_leaves_garbage", lambda tensor, cleared=cleared: cleared)
        weight.grad = None
        grouped_linear(rows, weight, Groups.of(rows, torch.tensor(counts))).backward(grad)
        assert weight.grad is not None
        assert expected is not None
        assert torch.equal(weight.grad, expected) == (cleared or 0 not in counts)


@pytest.mark.parametrize("zero", [KERNELS.zero_empty_groups, reference.zero_empty_groups])
def test_empty_groups_are_cleared_in_place(zero: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        grad = torch.full((4, 3, 5), float("nan"), dtype=dtype)
        zero(grad, torch.tensor([0, 2, 2, 7], dtype=torch.int32))
        assert [bool(torch.isnan(one).all()) for one in grad] == [False, True, False, True]
        assert not grad[0].any()
        assert not grad[2].any()


def test_opcheck() -> None:
    args = torch.ones(3, 2, 2), torch.tensor([0, 2, 2], dtype=torch.int32)
    torch.library.opcheck(KERNELS.zero_empty_groups.default, args)


GRAD, ENDS = torch.zeros(3, 2, 4), torch.zeros(3).int()
ERRORS = [
    (
        (GRAD.transpose(0, 2), ENDS),
        "grad_SMK.shape = [4, 2, 3]: it must be [S, M, K], contiguous. Pass the gradient of the weights of all groups",
    ),
    ((GRAD, ENDS.long()), "ends_S.dtype = int64: it must be int32. Convert it with ends_S.int()"),
    (
        (GRAD, ENDS[:2]),
        "ends_S.shape = [2]: it must be [S] = [3], as grad_SMK has it, contiguous. "
        "Pass where the rows of each group end",
    ),
]


@pytest.mark.parametrize(("args", "text"), ERRORS)
def test_errors_read_the_same_whatever_serves_the_op(args: tuple[Tensor, Tensor], text: str) -> None:
    for zero in (KERNELS.zero_empty_groups, reference.zero_empty_groups):
        with pytest.raises(RuntimeError) as caught:
            zero(*args)
        assert str(caught.value) == text


def test_where_torchs_grouped_gemm_is_one_kernel() -> None:
    found = {
        (capability, dtype)
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if library_has_kernel(capability, dtype)
    }
    assert found == {(capability, torch.bfloat16) for capability in ((9, 0), (10, 0), (10, 3))}
    assert not wants_counts_on_device(torch.zeros(1))
    assert wants_counts_on_device(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("counts", COUNTS)
def test_a_recomputed_activation_has_the_same_bits_and_is_not_kept(counts: tuple[int, ...]) -> None:
    kept: list[list[Tensor]] = []
    results = []
    for recomputed in (True, False):
        rows, weight, grad = inputs(counts, torch.float32)
        kept.append([])
        scale = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(2)).requires_grad_()

        def activate(rows_NK: Tensor, scale_N1: Tensor) -> Tensor:
            return F.silu(rows_NK) * scale_N1

        def note(tensor: Tensor, saved: list[Tensor] = kept[-1]) -> Tensor:
            saved.append(tensor)
            return tensor

        groups = Groups.of(rows, torch.tensor(counts))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if recomputed:
                out = recomputed_linear(activate, (rows, scale), weight, groups)
            else:
                out = grouped_linear(activate(rows, scale), weight, groups)
        out.backward(grad)
        results.append((out, rows.grad, scale.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert [one.shape for one in kept[0]] == [(len(counts), 24, 16), (sum(counts), 16), (sum(counts), 1)]
    assert len(kept[1]) > len(kept[0])
