"""What Megatron, and who starts a run, have to be told about this project's experts."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_own_experts(args: Namespace) -> bool:
    """Whether the experts are `SlottedExperts`, not Megatron's or TransformerEngine's."""
    return bool(args.smartmoe and args.smartmoe_experts == "grouped_mm")


def declare_grouped(args: Namespace) -> None:
    """Satisfy Megatron's rule that `--recompute-modules moe_act` needs `--moe-grouped-gemm`.

    `SlottedExperts` are grouped and recompute their activation, with and without TransformerEngine; the flag would ask
    for TransformerEngine's experts, which they replace.

    Args:
        args: Megatron's arguments, validated; the model's configuration is made from them afterwards.
    """
    selective = args.recompute_granularity == "selective"
    if has_own_experts(args) and selective and "moe_act" in (args.recompute_modules or []):
        args.moe_grouped_gemm = True


def gemm_line(capability: tuple[int, int], dtype: torch.dtype, *, triton_fault: str | None, accumulates: bool) -> str:
    """How the experts are multiplied on GPUs of this compute capability.

    Args:
        capability: of the GPU.
        dtype: of the weights.
        triton_fault: why Triton's kernels do not run here, or None.
        accumulates: whether weight gradients are to be added to float32 sums as they are computed.
    """
    from megatron_smartmoe.ops.grouped_linear import library_has_kernel

    name, version = str(dtype).removeprefix("torch."), ".".join(map(str, capability))
    has_kernel = library_has_kernel(capability, dtype)
    if has_kernel:
        line = "experts: torch's grouped GEMM, one kernel for all experts of a rank"
    elif triton_fault is None:
        line = "experts: a grouped GEMM in Triton, one kernel for all experts of a rank"
    else:
        line = "experts: a GEMM for each expert"
    line += f" ({name}, compute capability {version})"
    if accumulates and name != "float32":
        line += "; " + _gradients(has_kernel, triton_fault)
    if triton_fault is not None and (accumulates or not has_kernel):
        line += f"; Triton does not work here: {triton_fault}"
    return line


def _gradients(has_kernel: bool, triton_fault: str | None) -> str:
    """How weight gradients come into float32 sums."""
    if triton_fault is None:
        return "weight gradients are added to the float32 sums by a Triton kernel"
    if has_kernel:
        return "weight gradients are rounded to the type of the weights before they are added to the float32 sums"
    return "weight gradients are added to the float32 sums by these GEMMs"
