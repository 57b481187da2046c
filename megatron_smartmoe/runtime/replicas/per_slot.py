"""PerSlot: a weight of several slots, each a tensor of its own, read like one tensor `[S, ...]`.

TransformerEngine's grouped linear has a parameter per expert, or one that cannot be indexed. What moves weights and
gradients of replicas reads and writes one slot at a time, and so does not care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PerSlot:
    """One weight of every slot.

    Attributes:
        slots: S tensors of one shape and type.
        packed: the parameter whose memory they are; None where each is a parameter.
    """

    slots: tuple[torch.Tensor, ...]
    packed: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, slot: int) -> torch.Tensor:
        return self.slots[slot]

    @property
    def shape(self) -> torch.Size:
        """`[S, ...]`."""
        return torch.Size((len(self.slots), *self.slots[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        """The type of every slot."""
        return self.slots[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self.slots[0].device

    @property
    def main_grad(self) -> PerSlot:
        """The gradients that the optimizer reads; Megatron's wrapper gives one to each parameter."""
        if self.packed is not None:
            return PerSlot(self.packed.main_grad.view(self.shape).unbind(0))  # type: ignore[attr-defined]
        return PerSlot(tuple(slot.main_grad for slot in self.slots))  # type: ignore[attr-defined]

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What the optimizer knows."""
        return self.slots if self.packed is None else (self.packed,)


SlotWeight = torch.Tensor | PerSlot  # `[S, ...]`


def tensors_of(weights: Sequence[SlotWeight]) -> list[torch.Tensor]:
    """The parameters that hold the weights."""
    return [
        tensor for weight in weights for tensor in (weight.parameters if isinstance(weight, PerSlot) else (weight,))
    ]
