"""Digests of experts, to show that a migration changes places and nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.spec.arrays import IntArray

_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number: spreads the positions
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20  # elements digested at a time, to bound the temporary memory


def fingerprints(
    state: LayerState, slot_of_expert_E: IntArray, ep_rank: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """A 64-bit digest of every tensor of every expert, int64 `[E, tensors]`, on the CPU. A collective call.

    Bits and positions count, places do not: it is equal before and after a migration, whatever cuts the tensors are
    stored in, because the digest of a whole is the sum of the digests of its parts. Replicated tensors are counted
    once per replica, so that one replica that differs from the others is seen.

    Args:
        state: The layer's experts on this rank.
        slot_of_expert_E: The homes in force.
        ep_rank: This rank's place in its expert-parallel group.
        group: All ranks of the grid (those of several expert-tensor-parallel ranks may be summed together).
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
        values: A flat tensor of any type of 1, 2, 4 or 8 bytes.
        first: Position of the first element in the whole tensor.
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
