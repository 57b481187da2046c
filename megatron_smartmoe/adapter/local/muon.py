"""Muon on experts in slots: each expert's matrix is orthogonalized for itself, as if it were a parameter of its own.

Megatron gives Muon the parameters with two axes and all others to Adam. `SlottedExperts` has the matrices of all its
experts in parameters with three axes, which would therefore be trained by another optimizer than stock Megatron's
experts, without a word. Here such parameters are matrices like any other. Lion, which treats each element for itself,
takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

MEGATRONS_REGISTRY = "megatron.core.optimizer.emerging_optimizers"  # since 0.18
OPTIMIZERS = ("muon", "dist_muon", "lion")  # of emerging-optimizers, that train experts in slots as stock Megatron does


def mark_matrices(parameter: torch.nn.Parameter) -> None:
    """Mark a parameter `[slots, rows, columns]` as one matrix per slot."""
    parameter.holds_matrices = True  # type: ignore[attr-defined]


def holds_matrices(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds a matrix per slot."""
    return bool(getattr(parameter, "holds_matrices", False))


def without_matrices(is_for_adam: Callable[[torch.nn.Parameter], bool]) -> Callable[[torch.nn.Parameter], bool]:
    """Megatron's rule which parameters go to Adam, with those of slots left to the main optimizer."""
    return lambda parameter: is_for_adam(parameter) and not holds_matrices(parameter)


def with_matrices(is_matrix: Callable[[torch.nn.Parameter], bool]) -> Callable[[torch.nn.Parameter], bool]:
    """Megatron's rule which parameters the layer-wise optimizer gives to single ranks, with those of slots."""
    return lambda parameter: is_matrix(parameter) or holds_matrices(parameter)


def orthogonalize_slots(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's `TensorParallelMuon.orthogonalize`, for the matrix of each slot."""

    def orthogonalize(muon: Any, parameter: torch.Tensor, gradient: torch.Tensor, **settings: Any) -> torch.Tensor:
        if gradient.dim() != 3:
            return original(muon, parameter, gradient, **settings)
        partition_dim: int = getattr(parameter, "partition_dim")  # noqa: B009
        matrix = SimpleNamespace(expert_tp=True, partition_dim=partition_dim - 1)  # what the original reads of it
        return torch.stack([original(muon, matrix, slot, **settings) for slot in gradient])

    return orthogonalize
