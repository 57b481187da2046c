"""Files of torch.save, read without torch: every element type, views, and files that claim what they do not hold."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers import torch_save
from megatron_smartmoe.spec.readers.torch_save import StoredTensor, read_saved

MATRIX = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
TENSORS = {
    "float32": MATRIX,
    "float64": MATRIX.double(),
    "bfloat16": MATRIX.bfloat16(),
    "float16": MATRIX.half(),
    "float8_e4m3fn": MATRIX.to(torch.float8_e4m3fn),
    "int64": torch.arange(3),
    "int32": torch.arange(3, dtype=torch.int32),
    "uint8": torch.arange(3, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    """As Megatron's parameters and main weights are."""
    tensor.shared = False  # type: ignore[attr-defined]
    return tensor


VIEWS = {
    "transposed": MATRIX.t(),
    "slice": MATRIX[1:3, 2:5],
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0),
    "parameter": torch.nn.Parameter(MATRIX),
    "tensor with attributes": with_attribute(MATRIX.clone()),
    "parameter with attributes": with_attribute(torch.nn.Parameter(MATRIX)),
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_every_type_and_view(tmp_path: Path) -> None:
    content = {**TENSORS, **VIEWS}
    found = read_saved(saved(content, tmp_path / "x"), "a file")
    for name, tensor in content.items():
        read = found[name]
        assert isinstance(read, StoredTensor)
        assert (read.dtype, read.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert read.read().tobytes() == bits(tensor), name


def test_a_part_of_a_file_and_a_part_of_a_tensor(tmp_path: Path) -> None:
    data = saved(TENSORS, tmp_path / "x").read_bytes()
    (tmp_path / "y").write_bytes(b"before" + data + b"behind")
    found = read_saved(tmp_path / "y", "a part", offset_bytes=6, length_bytes=len(data))
    assert found["float32"].read(3, 20).tobytes() == bits(MATRIX.reshape(-1)[3:20])


def test_blocks_take_the_memory_of_one(tmp_path: Path) -> None:
    whole = torch.arange(2.0**22)
    found = read_saved(saved(whole, tmp_path / "x"), "a file")
    tracemalloc.start()
    total = sum(float(block.sum(dtype=np.float64)) for _, block in found.blocks())
    assert tracemalloc.get_traced_memory()[1] < whole.nbytes
    tracemalloc.stop()
    assert total == whole.double().sum()


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with other content."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as before, zipfile.ZipFile(path, "w", compression) as after:
        for info in before.infolist():
            after.writestr(info.filename, change(info.filename.rpartition("/")[2], before.read(info)))
    return path


class View:
    """A tensor as a pickle describes it."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.args, False, {})


class Storage:
    pass


def described(*args: Any) -> Callable[[str, bytes], bytes]:
    """Change of the archive: its tensor becomes a view with these arguments."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, entry: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 35) if isinstance(entry, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(View(*args))
    return lambda name, data: buffer.getvalue() if name == "data.pkl" else data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (described(0, (2**40,), (1,)), r"is larger than its storage of 140 bytes$"),
        (described(30, (7,), (1,)), r"is larger than its storage of 140 bytes$"),
        (described(-1, (7,), (1,)), r"a tensor of shape \(7,\), strides"),
        (described(0, (7, 5), (1,)), r"a tensor of shape \(7, 5\), strides \(1,\)$"),
        (described(0, (2**30, 2**30), (0, 0)), r"whose elements share their bytes$"),
        (lambda name, data: data[:50] if name == "0" else data, r"is larger than its storage of 50 bytes$"),
        (lambda name, data: b"big" if name == "byteorder" else data, r"was written by a big-endian machine$"),
    ],
)
def test_a_file_that_claims_more_than_it_holds(change: Any, says: str, tmp_path: Path) -> None:
    path = rewritten(saved(MATRIX, tmp_path / "x"), change)
    with pytest.raises(CheckpointError, match=says):
        read_saved(path, "a file")


def test_a_packed_storage_is_refused(tmp_path: Path) -> None:
    path = rewritten(saved(MATRIX, tmp_path / "x"), lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"storage 'x/data/0' is packed, which torch never does$"):
        read_saved(path, "a file")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_save, "_LARGEST_PICKLE_BYTES", 2**20)
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as entry:
        entry.write(bytes(2**21))
    with pytest.raises(CheckpointError, match=r"is too large: it unpacks to 2,097,152 bytes"):
        read_saved(path, "a file")


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = saved(MATRIX, tmp_path / "x")
    found = read_saved(path, "a file")
    os.truncate(path, found.offset_bytes + 8)
    with pytest.raises(CheckpointError, match=r"x is truncated: it ends in a tensor of shape \(5, 7\)$"):
        found.read()


def test_every_truncation_is_one_error(tmp_path: Path) -> None:
    data = saved(MATRIX, tmp_path / "x").read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "y").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            read_saved(tmp_path / "y", "a file")
