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
        kind: `weight` or `bias`; biases are `[S, 1, rows]` here, and one axis each in the checkpoint.
        experts: logical expert in each slot.
        num_experts: E, the experts of the whole layer.
        tp_axis: axis of one expert's matrix that expert tensor parallelism splits.
        tp_rank, tp_size: this rank in the expert-tensor-parallel group, and the group's size.
        gated: whether the matrix holds gate and linear rows; expert tensor parallelism splits each half separately.
        offsets: position of the layer in the global tensor, from Megatron; (axis, index, size) for each axis in front.
        singleton: one key per expert instead of one global tensor (`singleton_local_shards` in Megatron's metadata).
    """

    linear: str
    kind: str
    experts: Sequence[int]
    num_experts: int
    tp_axis: int
    tp_rank: int
    tp_size: int
    gated: bool
    offsets: tuple[tuple[int, int, int], ...]
    singleton: bool

    def factory(self, parameter: torch.Tensor, prefix: str, replica_id: ReplicaId) -> ShardedTensorFactory:
        """Make the entry of a parameter `[S, rows, columns]` for `sharded_state_dict`.

        Args:
            parameter: weights or biases of all home slots, or optimizer state of the same shape.
            prefix: key of the layer's experts in Megatron's checkpoints.
            replica_id: which of the ranks that hold the same data this one is; Megatron saves the one with zeros.
        """
        key = prefix if self.singleton else f"{prefix}.{self.linear}.{self.kind}"
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
        halves = 2 if self.gated else 1
        return [
            self._sharded_matrix(key, rows, expert, half, replica_id)
            for expert, matrix in zip(self.experts, slots if self.kind == "weight" else slots.squeeze(1), strict=True)
            for half, rows in enumerate(matrix.chunk(halves, dim=0))
        ]

    def _sharded_matrix(
        self, key: str, matrix: torch.Tensor, expert: int, half: int, replica_id: ReplicaId
    ) -> ShardedTensor:
        """One expert's matrix; of a gated one only the gate rows (half 0) or the linear rows (half 1)."""
        if self.singleton:  # a key per expert; the halves have keys of their own
            key = f"{key}.{expert}.{self.linear}.{self.kind}" + (("_w", "_v")[half] if self.gated else "")
            offsets, tp_index, tp_parts = self.offsets, self.tp_rank, self.tp_size
        else:  # one tensor [..., E, rows, columns], in which all gate rows come before all linear rows
            offsets = (*self.offsets, (len(self.offsets), expert, self.num_experts))
            tp_index, tp_parts = self.tp_rank + half * self.tp_size, self.tp_size * (2 if self.gated else 1)
        split = (self.tp_axis + len(offsets), tp_index, tp_parts)
        return ShardedTensor.from_rank_offsets(
            key, matrix, *offsets, split, replica_id=replica_id, prepend_axis_num=len(offsets)
        )

    @torch.no_grad()
    def _merge(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        if self.gated:
            matrices = [torch.cat(halves) for halves in zip(matrices[::2], matrices[1::2], strict=True)]
        slots = torch.stack(matrices)
        return slots if self.kind == "weight" else slots.unsqueeze(1)
