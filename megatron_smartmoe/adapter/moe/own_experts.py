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


def gemm_line(capability: tuple[int, int], dtype: torch.dtype) -> str:
    """How the experts are multiplied on GPUs of this compute capability."""
    from megatron_smartmoe.ops.grouped_linear import library_has_kernel

    name, version = str(dtype).removeprefix("torch."), ".".join(map(str, capability))
    if library_has_kernel(capability, dtype):
        here = f"{name}, compute capability {version}"
        return f"experts: torch's grouped GEMM, one kernel for all experts of a rank ({here})"
    return (
        f"experts: a GEMM for each expert, because torch's grouped GEMM has a kernel only for bfloat16 on compute "
        f"capability 9.x and 10.x (here {name}, {version})"
    )
