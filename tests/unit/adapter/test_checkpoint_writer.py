"""Checksums of shards, computed while they are written: those of the files, or none."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import MetadataIndex, WriteItem, WriteItemType

from megatron_smartmoe.adapter.checkpoint import writer
from megatron_smartmoe.checkpoint.checksum import checksum_of_file

ITEMS = [io.BytesIO(b"arguments"), torch.arange(7.0), torch.randn(300_000), torch.randn(3, 5)[:, 1:3]]


def write_shard(past: bytes) -> Callable[..., Any]:
    """A function with the arguments of Megatron's that writes a file; `past` goes past the transforms."""

    def write(transforms: list[Any], local_proc_idx: int, write_bucket: tuple[Path, list[Any]]) -> int:
        path, items = write_bucket
        with path.open("wb") as stream:
            for data in items:
                kind = WriteItemType.TENSOR if isinstance(data, torch.Tensor) else WriteItemType.BYTE_IO
                item = WriteItem(index=MetadataIndex("x"), type=kind)
                _write_item(transforms[0], stream, data, item, path.name, SerializationFormat.TORCH_SAVE)
            stream.write(past)
        return local_proc_idx

    return writer.hashing(write)


@pytest.mark.parametrize("past", [b"", b"seen by nobody"])
def test_what_was_written_need_not_be_read(tmp_path: Path, past: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "__0_0.distcp"
    assert write_shard(past)([_StorageWriterTransforms()], 3, (path, ITEMS)) == 3
    reads: list[Path] = []

    def read(path: Path) -> tuple[int, str]:
        reads.append(path)
        return checksum_of_file(path)

    monkeypatch.setattr(writer, "checksum_of_file", read)
    assert writer.checksum_of_written(path) == checksum_of_file(path)
    assert len(reads) == bool(past)
    assert writer.checksum_of_written(path) == checksum_of_file(path)  # what was known is told once
    assert len(reads) == bool(past) + 1


def test_a_full_disk_is_the_error_of_the_write(tmp_path: Path) -> None:
    class FullDisk:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    class Transforms:
        def transform_save_stream(self, item: Any, stream: Any) -> tuple[Any, list[Any]]:
            return FullDisk(), []

    def write(transforms: list[Any], local_proc_idx: int, write_bucket: Any) -> None:
        stream, _ = transforms[0].transform_save_stream(None, None)
        stream.write(bytes(2**20))

    with pytest.raises(OSError, match="No space left"):
        writer.hashing(write)([Transforms()], 0, (tmp_path / "shard", []))
