"""Slot-major parameters as Megatron's checkpoints hold experts: a tensor per expert, in logical order.

In a torch_dist checkpoint `...experts.experts.linear_fc1.weight` is one global tensor `[layers, E, F1, H]`, whoever
wrote it: SequentialMLP, TEGroupedMLP, or the slots of this project, wherever each expert happened to live. A
`ShardedTensorFactory` splits a parameter into its experts on saving and stacks them on loading, and Megatron applies
the same factory to the main weights and moments, so the optimizer's state follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint


@dataclass(frozen=True, kw_only=True)
class SlotSharding:
    """Where the experts of one parameter belong in the checkpoint.

    Attributes:
        linear: `linear_fc1` or `linear_fc2`, as Megatron's experts name it.
        experts: logical expert in each slot.
        num_experts: E, of the whole layer.
        tp_axis: axis of one expert's matrix that expert tensor parallelism splits.
        tp_rank, tp_size: of the expert-tensor-parallel group.
        gated: whether the matrix holds gate and linear rows, which are split over ranks each for itself.
        offsets: of the layers around, from Megatron: (axis, rank, ranks) each.
        singleton: one key per expert instead of one global tensor (`singleton_local_shards` in Megatron's metadata).
    """

    linear: str
    experts: Sequence[int]
    num_experts: int
    tp_axis: int
    tp_rank: int
    tp_size: int
    gated: bool
    offsets: tuple[tuple[int, int, int], ...]
    singleton: bool

    def factory(self, parameter: torch.Tensor, prefix: str, replica_id: ReplicaId) -> ShardedTensorFactory:
        """The parameter `[S, rows, columns]` for `sharded_state_dict`; `prefix` is that of Megatron's experts."""
        key = prefix if self.singleton else f"{prefix}.{self.linear}.weight"
        return ShardedTensorFactory(key, parameter, self._build, self._merge, replica_id)

    def extra_states(self, prefix: str, data_rank: int) -> dict[str, ShardedObject]:
        """The empty `_extra_state` of each expert's linear layer, without which stock Megatron refuses to load."""
        replica_id = (0, self.tp_rank, data_rank)
        states = {}
        for slot, expert in enumerate(self.experts):
            offsets = self.offsets
            key = f"{prefix}.{self.linear}._extra_state"
            if self.singleton:
                key = f"{prefix}.{expert}.{self.linear}._extra_state"
            else:
                offsets = (*offsets, (len(offsets), expert, self.num_experts))
            states[f"{self.linear}.{slot}"] = make_sharded_object_for_checkpoint(None, key, offsets, replica_id)
        return states

    @torch.no_grad()
    def _build(self, key: str, slots: torch.Tensor, replica_id: ReplicaId, flattened_range: object) -> list[Any]:
        assert flattened_range is None, "Megatron flattens no tensor any more"
        parts = 2 if self.gated else 1
        return [
            self._piece(key, piece, expert, part, replica_id)
            for expert, matrix in zip(self.experts, slots, strict=True)
            for part, piece in enumerate(matrix.chunk(parts, dim=0))
        ]

    def _piece(self, key: str, piece: torch.Tensor, expert: int, part: int, replica_id: ReplicaId) -> ShardedTensor:
        """One expert's matrix, or its gate (part 0) or linear (part 1) rows."""
        offsets, parts = self.offsets, 1
        if self.singleton:
            key = f"{key}.{expert}.{self.linear}.weight" + ("", ("_w", "_v")[part])[self.gated]
        else:
            offsets, parts = (*offsets, (len(offsets), expert, self.num_experts)), 2 if self.gated else 1
        tp_offset = self.tp_rank + (part * self.tp_size if parts == 2 else 0)
        split = (self.tp_axis + len(offsets), tp_offset, self.tp_size * parts)
        return ShardedTensor.from_rank_offsets(
            key, piece, *offsets, split, replica_id=replica_id, prepend_axis_num=len(offsets)
        )

    @torch.no_grad()
    def _merge(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        if self.gated:
            pieces = [torch.cat(pair) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
        return torch.stack(pieces)
