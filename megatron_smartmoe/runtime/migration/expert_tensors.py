"""What an expert is, as tensors on this rank: weights, fp32 main weights, moments, each a flat run of elements.

A home slot holds a list of pieces in the order of the layout's tensors. A piece is a flat view of the live tensor, cut
to what this rank holds of it: an expert may be a row of a 3-D parameter, a parameter of its own, or the part of either
that a distributed optimizer keeps here. Whoever moves experts sees pieces only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.transfers import LayerLayout
from megatron_smartmoe.spec.arrays import IntArray

_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number: spreads the positions
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20  # elements digested at a time, to bound the temporary memory


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerState:
    """The experts of one layer on this rank.

    Attributes:
        layout: of the tensors, equal on all ranks.
        shards: which shard of each tensor this rank is.
        pieces: `[S][tensors]` flat, contiguous views of the live tensors; what this rank does not hold is empty.

    Raises:
        PlanError: a piece is not what the layout says.
    """

    layout: LayerLayout
    shards: tuple[int, ...]
    pieces: tuple[tuple[torch.Tensor, ...], ...]

    def __post_init__(self) -> None:
        if len(self.pieces) != self.layout.home_slots:
            raise PlanError(f"{len(self.pieces)} slots of pieces, {self.layout.home_slots} slots in the layout")
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


def fingerprints(
    state: LayerState, slot_of_expert_E: IntArray, ep_rank: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """A 64-bit digest of every tensor of every expert, int64 `[E, tensors]`, on the CPU. A collective call.

    Bits and positions count, places do not: it is equal before and after a migration, whatever cuts the tensors are
    stored in, because the digest of a whole is the sum of the digests of its parts. Replicated tensors are counted
    once per replica, so that one replica that differs from the others is seen.

    Args:
        state: of this rank.
        slot_of_expert_E: homes in force.
        ep_rank: of this rank.
        group: all ranks of the grid (those of several expert-tensor-parallel ranks may be summed together).
    """
    slots = state.layout.home_slots
    device = state.pieces[0][0].device
    total_ET = torch.zeros(len(slot_of_expert_E), len(state.layout.tensors), dtype=torch.int64, device=device)
    for expert, at in enumerate(slot_of_expert_E.tolist()):
        if at // slots == ep_rank:
            for index, (tensor, shard) in enumerate(zip(state.layout.tensors, state.shards, strict=True)):
                first = int(tensor.held_SC2[at % slots, shard, 0])
                total_ET[expert, index] = digest(state.pieces[at % slots][index], first)
    dist.all_reduce(total_ET, group=group)
    return total_ET.cpu()


def digest(values: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Sum over elements of (bits + 1) times an odd number that depends on the position; int64 scalar, mod 2^64.

    Args:
        values: flat, any type of 1, 2, 4 or 8 bytes.
        first: position of the first element in the whole tensor.
    """
    words = values.detach().view(_WORD[values.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].to(torch.int64)
        begin = first + start
        position = torch.arange(begin, begin + len(block), device=values.device)
        weight = position.mul_(_PRIME).bitwise_xor_(position >> 29).bitwise_or_(1)
        total += weight.mul_(block + 1).sum()
    return total
