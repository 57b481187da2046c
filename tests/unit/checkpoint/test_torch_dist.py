"""Index and common state of torch_dist checkpoints, read without torch; damage is named with its file."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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

from megatron_smartmoe.checkpoint.torch_dist import (
    COMMON_OBJECT,
    StoredItem,
    is_torch_dist,
    read_common,
    read_index,
)
from megatron_smartmoe.errors import CheckpointError

ARGS = argparse.Namespace(num_layers=3, params_dtype=torch.float32)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write(folder: Path, common: object, **changes: Any) -> Path:
    """A checkpoint of one tensor in two chunks and the common state, written with torch's own classes."""
    weight, state = saved(torch.arange(4.0)), saved([common])
    name = changes.get("file", "__0_0.distcp")
    chunks = [ChunkStorageMetadata(torch.Size([at]), torch.Size([4])) for at in (0, 4)]
    metadata = Metadata(
        state_dict_metadata={
            "weight": TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([8]), chunks),
            COMMON_OBJECT: BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={
            MetadataIndex("weight", torch.Size([0])): _StorageInfo(name, 0, len(weight)),
            MetadataIndex("weight", torch.Size([4])): _StorageInfo(name, len(weight), len(weight)),
            MetadataIndex(COMMON_OBJECT): _StorageInfo(name, 2 * len(weight), len(state)),
        },
    )
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(weight + weight + state)
    return folder


def test_index_and_common_state(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter", {"args": ARGS, "iteration": 7})
    size = len(saved(torch.arange(4.0)))
    index = read_index(folder)
    assert index.shapes == {"weight": (8,)}
    assert index.items["weight", (4,)] == StoredItem(file="__0_0.distcp", offset_bytes=size, length_bytes=size)
    common = read_common(folder)
    assert common["iteration"] == 7
    assert common["args"].num_layers == 3
    assert is_torch_dist(folder)


def test_older_checkpoints_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter", {"iteration": 7})
    (folder / "common.pt").write_bytes(saved({"args": ARGS, "iteration": 5}))
    assert read_common(folder)["iteration"] == 5


def test_neither_torch_nor_code_of_the_file_is_loaded(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    folder = write(tmp_path / "iter", {"args": ARGS, "x": Planted()})
    code = (
        "import sys; from pathlib import Path; from megatron_smartmoe.checkpoint.torch_dist import read_common\n"
        f"print(read_common(Path({str(folder)!r}))['args'].num_layers, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3 False\n"
    assert not (tmp_path / "ran").exists()


def test_tensors_come_as_descriptions(tmp_path: Path) -> None:
    index = read_index(write(tmp_path / "iter", {}))
    found = {offsets: tensor.read().tolist() for key, offsets, tensor in index.tensors() if key == "weight"}
    assert found == {(0,): [0, 1, 2, 3], (4,): [0, 1, 2, 3]}
    assert index.smallest_sizes() == {"__0_0.distcp": (tmp_path / "iter" / "__0_0.distcp").stat().st_size}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata cannot be read: No such file or directory$"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), r"\.metadata cannot be read: EOFError"),
        (
            lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({})),
            r"\.metadata is damaged: it holds \{\}, where Metadata was expected$",
        ),
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp cannot be read: No such file"),
        (
            lambda folder: os.truncate(folder / "__0_0.distcp", 3000),
            r"__0_0\.distcp is truncated: it has 3,000 bytes, and object 'common_state/shard_0_1' ends at byte [\d,]+$",
        ),
        (lambda folder: (folder / "common.pt").write_bytes(b"x"), r"common\.pt is damaged: BadZipFile"),
        (
            lambda folder: (folder / "common.pt").write_bytes(saved(5)),
            r"common\.pt is damaged: its common state is a int, no mapping$",
        ),
    ],
)
def test_damage_is_named(damage: Any, says: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "iter", {"args": ARGS})
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        read_common(folder)


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter", {"args": ARGS}, file="../other/__0_0.distcp")
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_common(folder)
