"""Which rank holds which part of an expert, and which parts have to move when it changes its slot.

Optimizer state is sharded over the expert-data-parallel (EDP) ranks, and the shard boundaries run through an expert at
another place in each slot. A transfer is the intersection of two intervals: what EDP rank i holds of the expert in its
old slot, and what EDP rank j must hold of it in its new slot. So each byte moves once, from the rank that owns it to
the rank that needs it. The alternative, gathering the expert over EDP and sharding it again, moves D times the bytes.

A worker is one rank of the grid of R expert-parallel times D EDP ranks, numbered w = r * D + d. Ranks that differ in
expert-tensor-parallel rank are separate grids with equal plans.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import BoolArray


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorLayout:
    """One tensor of an expert (a weight, its fp32 main weight, a moment): which rank holds which part of it.

    Attributes:
        name: `weight1`, `weight1/exp_avg`: the parameter, then the kind of state.
        numel: elements of the whole tensor of one expert.
        itemsize: bytes of an element.
        copies: groups of EDP ranks; each group holds one complete tensor, its members in the order of the shards. D
            groups of one rank for a replicated tensor, one group of D for a sharded one.
        held_SC2: elements [start, stop) of the expert in slot s that shard c holds; start = stop for none of them.
    """

    name: str
    numel: int
    itemsize: int
    copies: tuple[tuple[int, ...], ...]
    held_SC2: IntArray

    def __post_init__(self) -> None:
        sizes_S = (self.held_SC2[..., 1] - self.held_SC2[..., 0]).sum(axis=1)
        if (sizes_S != self.numel).any():
            slot = int(np.argmax(sizes_S != self.numel))
            raise PlanError(f"{self.name}, slot {slot}: its shards hold {sizes_S[slot]} of {self.numel} elements")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerLayout:
    """The tensors of an expert of one layer; equal on all ranks of a grid."""

    layer: int
    tensors: tuple[TensorLayout, ...]

    @property
    def home_slots(self) -> int:
        """S, home slots per expert-parallel rank."""
        return int(self.tensors[0].held_SC2.shape[0])

    @property
    def edp_size(self) -> int:
        """D."""
        return sum(len(group) for group in self.tensors[0].copies)

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal layouts."""
        parts = [(t.name, t.numel, t.itemsize, t.copies, t.held_SC2.tolist()) for t in self.tensors]
        return hashlib.sha256(repr((self.layer, parts)).encode()).digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfers:
    """N runs of elements that move; sorted by source, target, expert, tensor, start. `source` and `target` are
    workers, `tensor` an index into the layout, [start, stop) elements of the expert's tensor."""

    source: IntArray
    target: IntArray
    expert: IntArray
    tensor: IntArray
    from_slot: IntArray
    to_slot: IntArray
    start: IntArray
    stop: IntArray
    nbytes: IntArray

    def __len__(self) -> int:
        return len(self.source)

    def where(self, mask: IntArray | BoolArray) -> Transfers:
        """The transfers that `mask` (bool or indices) selects."""
        return Transfers(**{name: column[mask] for name, column in vars(self).items()})


def transfers_of(moving: IntArray, before: IntArray, after: IntArray, layout: LayerLayout) -> Transfers:
    """Every run of elements that moves when experts `moving` go from global slots `before` to `after`."""
    num_slots, edp = layout.home_slots, layout.edp_size
    columns: list[IntArray] = []
    for index, tensor in enumerate(layout.tensors):
        # Step 1: intersect what each shard holds in the old slot with what each must hold in the new one.
        source_MC2, target_MC2 = tensor.held_SC2[before % num_slots], tensor.held_SC2[after % num_slots]
        start_MCC = np.maximum(source_MC2[:, :, None, 0], target_MC2[:, None, :, 0])
        stop_MCC = np.minimum(source_MC2[:, :, None, 1], target_MC2[:, None, :, 1])
        which, shard_from, shard_to = np.nonzero(stop_MCC > start_MCC)
        start, stop = start_MCC[which, shard_from, shard_to], stop_MCC[which, shard_from, shard_to]
        # Step 2: name the workers, in each group that holds a complete tensor.
        for group in np.array(tensor.copies):
            source = before[which] // num_slots * edp + group[shard_from]
            target = after[which] // num_slots * edp + group[shard_to]
            nbytes = (stop - start) * tensor.itemsize
            slots = (before[which] % num_slots, after[which] % num_slots)
            columns.append(
                np.stack([source, target, moving[which], np.full_like(which, index), *slots, start, stop, nbytes])
            )
    # Step 3: sort by source, target, expert, tensor, start, so that every message is one run of rows.
    table = np.concatenate(columns, axis=1)
    table = table[:, np.lexsort((table[6], table[3], table[2], table[1], table[0]))]
    names = ("source", "target", "expert", "tensor", "from_slot", "to_slot", "start", "stop", "nbytes")
    return Transfers(**dict(zip(names, table, strict=True)))
