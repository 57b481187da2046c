from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.safetensors_files import read_header

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(6).bfloat16(),
    "c": torch.arange(4).to(torch.float8_e4m3fn),
    "d": torch.tensor(2.5),
}
GOOD = save(TENSORS)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in TENSORS.items()
    }
    assert np.array_equal(found["a"].read(4, 8), [4, 5, 6, 7])
    assert np.array_equal(found["b"].read(), TENSORS["b"].view(torch.uint16).numpy())


@pytest.mark.parametrize(
    ("header", "data", "rule"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7, "is truncated: it has"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9, "is damaged: it has"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8, "does not have 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8, "no whole numbers"),
        ({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "its header: 'X9'"),
        ([1, 2], b"", "is damaged: its header"),
        (b"{", b"", "is damaged: its header"),
        (b"[" * 200_000, b"", "is damaged: its header"),
    ],
)
def test_damage_is_one_line(header: Any, data: bytes, rule: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rule) as raised:
        read_header(write(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(raised.value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_any_changed_byte_gives_a_header_or_an_error(at: int, byte: int, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])[: cut or None])
    try:
        found = read_header(path)
    except CheckpointError:
        return
    for tensor in found.values():
        assert tensor.offset_bytes + tensor.size_bytes <= path.stat().st_size
