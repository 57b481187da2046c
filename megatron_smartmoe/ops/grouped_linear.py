"""A linear layer per group of rows: groups that differ in length share one call, forward and backward.

torch's grouped GEMM has a kernel for bf16 on compute capability 9.x and 10.x. For everything else it copies the
offsets to the host, waits for them, and runs a GEMM per group: six waits a layer and micro-batch. There one Triton
kernel does it (`grouped_triton`), which reads the lengths on the device. Where Triton does not work, and on the CPU,
the groups are multiplied one by one with lengths that the host knows: torch's products and bits, without its waits.

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

from megatron_smartmoe.ops import triton_ops  # noqa: F401  # registers torch.ops.smartmoe_triton

_KERNEL_CAPABILITIES = (9, 10)  # major numbers
_UNCLEARED_CAPABILITY = 10


def library_has_kernel(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch's grouped GEMM is one kernel on GPUs of this compute capability, or a loop with host waits."""
    return dtype == torch.bfloat16 and capability[0] in _KERNEL_CAPABILITIES


def wants_counts_on_device(tensor: Tensor) -> bool:
    """Whether groups of these rows are multiplied by one kernel, which reads their lengths on the device."""
    if tensor.device.type == "meta":  # shapes alone: those of the kernel
        return True
    return tensor.is_cuda and (_torch_multiplies(tensor) or triton_fault(tensor.device) is None)


def _torch_multiplies(tensor: Tensor) -> bool:
    """Whether torch's grouped GEMM is what multiplies these rows in one call: on a GPU, where it has a kernel."""
    return not tensor.is_cuda or library_has_kernel(_capability(tensor.device), tensor.dtype)


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on this GPU, in one line; None where they do, which is tried once."""
    try:
        from megatron_smartmoe.ops import grouped_triton

        grouped_triton.try_kernels(device)
    except Exception as error:  # whatever is missing: Triton, a C compiler, a driver that is new enough
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


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


# Takes the operands of a weight's gradient (weight, rows, gradients of their products, groups), and returns what
# autograd gets in the gradient's place, or None.
Taker = Callable[[Tensor, Tensor, Tensor, Groups], Tensor | None]


def grouped_linear(rows_NK: Tensor, weight_SMK: Tensor, groups: Groups, taker: Taker | None = None) -> Tensor:
    """Rows of group s times `weight_SMK[s]` transposed.

    Args:
        rows_NK: rows sorted by group.
        weight_SMK: a weight per group.
        groups: where each group's rows are; they cover all rows.
        taker: who gets what the weight's gradient is computed from; then the backward pass computes none.

    Returns:
        `[N, M]`. The weight gradient of a group without rows is zero.
    """
    out_NM: Tensor = _GroupedLinear.apply(rows_NK, weight_SMK, groups, taker)  # type: ignore[no-untyped-call]
    return out_NM


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NK: Tensor, weight_SMK: Tensor, groups: Groups, taker: Taker | None) -> Tensor:
        ctx.save_for_backward(rows_NK, weight_SMK)
        ctx.groups, ctx.taker = groups, taker
        ctx.weight = None if taker is None else weight_SMK  # the object that has the attributes
        return multiply_groups(rows_NK, weight_SMK.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_NK, weight_SMK = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        grad_rows = multiply_groups(grad_NM, weight_SMK, ctx.groups) if ctx.needs_input_grad[0] else None
        grad_weight = _give(ctx, grad_NM, rows_NK, weight_SMK) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None, None


def _give(ctx: Any, grad_NM: Tensor, rows_NK: Tensor, weight_SMK: Tensor) -> Tensor | None:
    """The weight's gradient, or what stands for it where somebody takes what it is computed from."""
    if ctx.taker is None:
        return weight_gradient(grad_NM, rows_NK, weight_SMK, ctx.groups)
    taken: Tensor | None = ctx.taker(ctx.weight, rows_NK, grad_NM, ctx.groups)
    return taken


def recomputed_linear(
    activate: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    weight_SMK: Tensor,
    groups: Groups,
    taker: Taker | None = None,
) -> Tensor:
    """`grouped_linear(activate(*inputs), weight_SMK, groups)` which keeps the inputs, not what comes of them.

    The backward pass activates again: the same bits, less memory.

    Args:
        activate: draws no random number.
        inputs: its tensors.
        weight_SMK: a weight per group.
        groups: where each group's rows are; they cover all rows.
        taker: see `grouped_linear`.
    """
    out_NM: Tensor = _RecomputedLinear.apply(activate, weight_SMK, groups, taker, *inputs)  # type: ignore[no-untyped-call]
    return out_NM


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activate: Callable[..., Tensor],
        weight_SMK: Tensor,
        groups: Groups,
        taker: Taker | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight_SMK, *inputs)
        ctx.activate, ctx.groups, ctx.taker = activate, groups, taker
        ctx.weight = None if taker is None else weight_SMK
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
        grad_weight = _give(ctx, grad_NM, rows_NK.detach(), weight_SMK) if ctx.needs_input_grad[1] else None
        return None, grad_weight, None, None, *torch.autograd.grad(rows_NK, copies, grad_rows)


def multiply_groups(rows_NK: Tensor, weight_SKM: Tensor, groups: Groups) -> Tensor:
    """Rows of group s times `weight_SKM[s]`, `[N, M]`."""
    if groups.ends_S is not None:
        if _torch_multiplies(rows_NK):
            return F.grouped_mm(rows_NK, weight_SKM, offs=groups.ends_S)
        product_NM: Tensor = torch.ops.smartmoe_triton.multiply(rows_NK, weight_SKM, groups.ends_S)
        return product_NM
    out_NM = rows_NK.new_empty(rows_NK.shape[0], weight_SKM.shape[2])
    for group, begin, end in groups.bounds:
        torch.mm(rows_NK[begin:end], weight_SKM[group], out=out_NM[begin:end])
    return out_NM


def weight_gradient(grad_NM: Tensor, rows_NK: Tensor, weight_SMK: Tensor, groups: Groups) -> Tensor:
    """For each group its gradient's rows, transposed, times its rows; zero where a group has none."""
    if groups.ends_S is not None and not _torch_multiplies(rows_NK):
        gradient_SMK: Tensor = torch.ops.smartmoe_triton.weight_gradient(grad_NM, rows_NK, groups.ends_S)
        return gradient_SMK
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


def add_weight_gradient(total_SMK: Tensor, grad_NM: Tensor, rows_NK: Tensor, groups: Groups) -> None:
    """Add what `weight_gradient` computes to float32 sums, without rounding it to the type of the rows before."""
    if groups.ends_S is None:
        for group, begin, end in groups.bounds:
            _add_product(total_SMK[group], grad_NM[begin:end].t(), rows_NK[begin:end])
    elif not rows_NK.is_cuda or triton_fault(rows_NK.device) is None:
        torch.ops.smartmoe_triton.add_weight_gradient(total_SMK, grad_NM, rows_NK, groups.ends_S)
    else:  # said at the start: without Triton there is no kernel that does not round
        total_SMK += weight_gradient(grad_NM, rows_NK, total_SMK, groups)


def _add_product(total_MK: Tensor, left_MN: Tensor, right_NK: Tensor) -> None:
    """Add a product of 16-bit numbers to a float32 sum; the CPU has no GEMM of them with a wider result."""
    if total_MK.is_cuda:
        torch.addmm(total_MK, left_MN, right_NK, out_dtype=torch.float32, out=total_MK)
    else:
        total_MK.addmm_(left_MN.float(), right_NK.float())
