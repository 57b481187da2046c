"""Reading torch_dist checkpoints tensor by tensor, without Megatron."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def tensors(checkpoint: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every global tensor of an iteration's checkpoint."""
    reader = FileSystemReader(str(checkpoint / f"iter_{iteration:07d}"))
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(state, storage_reader=reader, no_dist=True)
    return state


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
