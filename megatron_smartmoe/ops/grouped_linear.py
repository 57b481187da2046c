"""A linear layer per group of rows: groups that differ in length share one call, forward and backward.

torch's grouped GEMM has a kernel for bf16 on compute capability 9.x and 10.x. For everything else it copies the
offsets to the host, waits for them, and runs a GEMM per group: six waits a layer and micro-batch. So there the groups
are multiplied here, one by one, with lengths that the host knows already: same products, same bits, no wait.

On capability 10.x the kernel's weight gradient of a group without rows may be garbage (CUTLASS did not clear an
accumulator that nothing is added to): such groups are cleared after it, whatever version of it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_KERNEL_CAPABILITIES = (9, 10)  # major numbers
_UNCLEARED_CAPABILITY = 10


def library_has_kernel(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch's grouped GEMM is one kernel on GPUs of this compute capability, or a loop with host waits."""
    return dtype == torch.bfloat16 and capability[0] in _KERNEL_CAPABILITIES


def wants_counts_on_device(tensor: Tensor) -> bool:
    """Whether groups of these rows are multiplied by one kernel, which reads their lengths on the device."""
    if tensor.device.type == "meta":  # shapes alone: those of the kernel
        return True
    return tensor.is_cuda and library_has_kernel(_capability(tensor.device), tensor.dtype)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _leaves_garbage(tensor: Tensor) -> bool:
    """Whether the kernel may leave a weight gradient without rows unwritten."""
    return tensor.is_cuda and _capability(tensor.device)[0] >= _UNCLEARED_CAPABILITY


@dataclass(frozen=True, kw_only=True)
class Groups:
    """How rows are cut into groups, in the form that their GEMMs need.

    Attributes:
        ends_S: where each group's rows end, int32 on the device of the rows, for one kernel; None for a GEMM per group.
        bounds: of the groups with rows: (group, first row, end), for a GEMM per group.
        empty: the groups without rows, for a GEMM per group.
    """

    ends_S: Tensor | None = None
    bounds: tuple[tuple[int, int, int], ...] = ()
    empty: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows_NK: Tensor, tokens_S: Tensor) -> Groups:
        """The groups of rows sorted by group.

        Args:
            rows_NK: the rows.
            tokens_S: the rows of each group, int64, on any device. Where `wants_counts_on_device` is False, the host
                waits for those that are not on the host.
        """
        if wants_counts_on_device(rows_NK):
            ends_S = tokens_S.cumsum(0, dtype=torch.int32)  # added up where they are: one launch, or one copy
            return cls(ends_S=ends_S.to(rows_NK.device, non_blocking=True))
        bounds, empty, begin = [], [], 0
        for group, tokens in enumerate(tokens_S.tolist()):
            if tokens == 0:
                empty.append(group)
            else:
                bounds.append((group, begin, begin + tokens))
            begin += tokens
        return cls(bounds=tuple(bounds), empty=tuple(empty))


def grouped_linear(rows_NK: Tensor, weight_SMK: Tensor, groups: Groups) -> Tensor:
    """Rows of group s times `weight_SMK[s]` transposed.

    Args:
        rows_NK: rows sorted by group.
        weight_SMK: a weight per group.
        groups: where each group's rows are; they cover all rows.

    Returns:
        `[N, M]`. The weight gradient of a group without rows is zero.
    """
    out_NM: Tensor = _GroupedLinear.apply(rows_NK, weight_SMK, groups)  # type: ignore[no-untyped-call]
    return out_NM


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NK: Tensor, weight_SMK: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(rows_NK, weight_SMK)
        ctx.groups = groups
        return multiply_groups(rows_NK, weight_SMK.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_NK, weight_SMK = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        grad_rows = multiply_groups(grad_NM, weight_SMK, ctx.groups) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad_NM, rows_NK, weight_SMK, ctx.groups) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


def recomputed_linear(
    activate: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight_SMK: Tensor, groups: Groups
) -> Tensor:
    """`grouped_linear(activate(*inputs), weight_SMK, groups)` which keeps the inputs, not what comes of them.

    The backward pass activates again: the same bits, less memory.

    Args:
        activate: draws no random number.
        inputs: its tensors.
        weight_SMK: a weight per group.
        groups: where each group's rows are; they cover all rows.
    """
    out_NM: Tensor = _RecomputedLinear.apply(activate, weight_SMK, groups, *inputs)  # type: ignore[no-untyped-call]
    return out_NM


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activate: Callable[..., Tensor], weight_SMK: Tensor, groups: Groups, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight_SMK, *inputs)
        ctx.activate, ctx.groups = activate, groups
        return multiply_groups(activate(*inputs), weight_SMK.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        weight_SMK, *inputs = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        with torch.enable_grad():
            copies = [each.detach().requires_grad_() for each in inputs]
            rows_NK = ctx.activate(*copies)
        grad_rows = multiply_groups(grad_NM, weight_SMK, ctx.groups)
        grad_weight = weight_gradient(grad_NM, rows_NK.detach(), weight_SMK, ctx.groups)
        return None, grad_weight, None, *torch.autograd.grad(rows_NK, copies, grad_rows)


def multiply_groups(rows_NK: Tensor, weight_SKM: Tensor, groups: Groups) -> Tensor:
    """Rows of group s times `weight_SKM[s]`, `[N, M]`."""
    if groups.ends_S is not None:
        return F.grouped_mm(rows_NK, weight_SKM, offs=groups.ends_S)
    out_NM = rows_NK.new_empty(rows_NK.shape[0], weight_SKM.shape[2])
    for group, begin, end in groups.bounds:
        torch.mm(rows_NK[begin:end], weight_SKM[group], out=out_NM[begin:end])
    return out_NM


def weight_gradient(grad_NM: Tensor, rows_NK: Tensor, weight_SMK: Tensor, groups: Groups) -> Tensor:
    """For each group its gradient's rows, transposed, times its rows; zero where a group has none."""
    if groups.ends_S is not None:
        grad_SMK = F.grouped_mm(grad_NM.t(), rows_NK, offs=groups.ends_S)
        if _leaves_garbage(grad_SMK):
            torch.ops.smartmoe.zero_empty_groups(grad_SMK, groups.ends_S)
        return grad_SMK
    grad_SMK = torch.empty_like(weight_SMK)
    for group, begin, end in groups.bounds:
        torch.mm(grad_NM[begin:end].t(), rows_NK[begin:end], out=grad_SMK[group])
    for group in groups.empty:
        grad_SMK[group].zero_()
    return grad_SMK
