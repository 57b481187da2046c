"""The tensors of an expert on this rank: weights, fp32 main weights, moments, each a flat run of elements.

A home slot holds a list of pieces in the order of the layout's tensors. A piece is a flat view of the part of a live
tensor that this rank holds: an expert may be a row of a 3-D parameter, a parameter of its own, or the part of either
that a distributed optimizer keeps here. A migration works with pieces only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.transfers import LayerLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerState:
    """The experts of one layer on this rank.

    Attributes:
        layout: The layout of the tensors, equal on all ranks.
        shards: The shard of each tensor that this rank holds.
        pieces: Flat, contiguous views of the live tensors, `[S][tensors]`; empty where this rank holds nothing.

    Raises:
        PlanError: A piece does not have the size or type that the layout states.
    """

    layout: LayerLayout
    shards: tuple[int, ...]
    pieces: tuple[tuple[torch.Tensor, ...], ...]

    def __post_init__(self) -> None:
        if len(self.pieces) != self.layout.home_slots:
            raise PlanError(f"slots of pieces = {len(self.pieces)}: the layout has {self.layout.home_slots}")
        for slot, pieces in enumerate(self.pieces):
            for piece, tensor, shard in zip(pieces, self.layout.tensors, self.shards, strict=True):
                held = int(tensor.held_SC2[slot, shard, 1] - tensor.held_SC2[slot, shard, 0])
                fits = piece.shape == (held,) and piece.is_contiguous() and piece.itemsize == tensor.itemsize
                if not fits:
                    raise PlanError(
                        f"layer {self.layout.layer}, slot {slot}, {tensor.name}: a flat piece of {held} elements of "
                        f"{tensor.itemsize} bytes is expected, got {tuple(piece.shape)} of {piece.dtype}"
                    )

    def run_bytes(self, slot: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        """The bytes of elements [start, stop) of an expert's tensor, uint8; a view of the live tensor."""
        first = int(self.layout.tensors[tensor].held_SC2[slot, self.shards[tensor], 0])
        return self.pieces[slot][tensor][start - first : stop - first].view(torch.uint8)
