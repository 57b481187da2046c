"""torch_dist checkpoints of a few tensors, written with torch's classes and without ranks."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_smartmoe.checkpoint.torch_dist import COMMON_OBJECT

LAYERS, EXPERTS, HIDDEN, FFN, VOCABULARY = 2, 4, 6, 8, 20
EXPERT_KEY = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
SHAPES = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    "decoder.layers.mlp.router.weight": (LAYERS, EXPERTS, HIDDEN),
    EXPERT_KEY: (LAYERS, EXPERTS, 2 * FFN, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
}
STATE = "optimizer.state."


def model(seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights, and main weights and moments as optimizer state, by the keys of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in SHAPES.items():
        main = torch.randn(shape, generator=generator)
        tensors[key] = main.to(dtype, copy=True)
        tensors[f"{STATE}param.{key}"] = main
        tensors[f"{STATE}exp_avg.{key}"] = torch.randn(shape, generator=generator)
        tensors[f"{STATE}exp_avg_sq.{key}"] = torch.randn(shape, generator=generator).square()
    return tensors


def write(
    folder: Path, tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Sequence[int]] | None = None, **common: Any
) -> Path:
    """A checkpoint of these tensors.

    Args:
        folder: to be made.
        tensors: by key.
        cuts: into how many parts each axis of a tensor is cut, by key; whole if it is not named.
        common: further content of the common state.
    """
    folder.mkdir(parents=True)
    args = argparse.Namespace(num_layers=LAYERS, num_experts=EXPERTS, bf16=True, consumed_train_samples=56)
    states: dict[str, Any] = {COMMON_OBJECT: BytesStorageMetadata()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    files = [bytearray(), bytearray()]

    def store(where: MetadataIndex, content: object) -> None:
        buffer, number = io.BytesIO(), len(storage) % 2
        torch.save(content, buffer)
        storage[where] = _StorageInfo(f"__{number}_0.distcp", len(files[number]), len(buffer.getvalue()))
        files[number] += buffer.getvalue()

    for key, tensor in tensors.items():
        parts = (cuts or {}).get(key, (1,) * tensor.dim())
        chunks = []
        for at in itertools.product(*(range(count) for count in parts)):
            sizes = [size // count for size, count in zip(tensor.shape, parts, strict=True)]
            offsets = torch.Size(i * size for i, size in zip(at, sizes, strict=True))
            box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone()
            chunks.append(ChunkStorageMetadata(offsets, box.shape))
            store(MetadataIndex(key, offsets), box)
        assert math.prod(parts) == len(chunks)
        states[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    store(MetadataIndex(COMMON_OBJECT), [{"args": args, "iteration": 7, **common}])
    for number, data in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(data)
    metadata = Metadata(state_dict_metadata=states, planner_data=None, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder
