"""The CPU facade: lets unmodified Megatron train on gloo where there is no GPU.

Megatron takes CUDA for granted: it asks for the current device, places tensors on it, opens streams and names the
`nccl` backend. Without a GPU this package replaces those calls by their exact CPU equivalents, so that the same
Megatron code runs, on the CPU, in the same order. The alternatives are a fork (which drifts) and a
`TorchFunctionMode` (which does the same in fewer lines, and slower on every op).

What it may do, and what it may not:

- It replaces attributes of `torch` only, never of Megatron; `install()` must run before the first `import megatron`.
- It is never loaded where a CUDA device is used: `install()` refuses.
- TransformerEngine and apex cannot be imported beside it: their kernels are for GPUs, and Megatron takes them where it
  finds them.
- It changes no numerics: each group below either answers a question about the device, moves nothing, or performs the
  same collective with another call.

One file per group, each function with the reason it exists: `devices` (device, memory, streams and random state),
`tensors` (where a tensor lives), `collectives` (gloo's rules for NCCL's calls), `compiler` (nothing is compiled while
importing).
"""

from __future__ import annotations

import sys

import torch

from megatron_smartmoe.adapter.cpu import collectives, compiler, devices, tensors
from megatron_smartmoe.errors import CompatError

_GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
_installed = False


def is_installed() -> bool:
    """Whether this process has the facade."""
    return _installed


def install() -> None:
    """Install every group, once. A second call does nothing.

    Raises:
        CompatError: Megatron was imported already (its decorators have run), or a CUDA device is visible.
    """
    global _installed
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise CompatError(
            "The CPU facade must be installed before megatron is imported: "
            "call megatron_smartmoe.adapter.cpu.install() first in the program."
        )
    if torch.cuda.is_available():
        raise CompatError(
            "The CPU facade is for machines without a GPU, and this process sees one. "
            "Pass --smartmoe-device cuda, or hide the GPU with CUDA_VISIBLE_DEVICES= ."
        )
    for group in (devices, tensors, collectives, compiler):
        group.install()
    for name in _GPU_PACKAGES:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say: cannot be imported
    _installed = True
