"""Norm and scale of many tensors where neither TransformerEngine nor apex is installed, for GPUs.

Megatron's own stand-ins wait for the GPU once for each tensor of the norm, and write a copy of each tensor to scale it.
These have the arguments of apex's `amp_C`, wait for nothing and scale in place. CPU runs keep Megatron's: the bits of
a norm depend on how it is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, float32 `[1]` on their device, and no norm of each."""
    assert not per_tensor, "Megatron asks for the norm of all tensors together"
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Sequence[torch.Tensor]],
    factor: float | torch.Tensor,
) -> None:
    """Write the first list's tensors times `factor` to those of the second, in place where both are the same."""
    sources, targets = list(tensor_lists[0]), list(tensor_lists[1])
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))
