"""Pickles are read as data: nothing that they name is run."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.unpickle import Opaque, read_pickle


class Planted:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_planted_command_does_not_run(tmp_path: Path) -> None:
    data = pickle.dumps({"args": Planted(tmp_path / "ran")})
    pickle.loads(pickle.dumps(Planted(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the plant works

    content = read_pickle(data, {}, "a file")
    assert not (tmp_path / "ran").exists()
    assert repr(content["args"]) == "<posix.system>"
    assert content["args"].args == (f"touch {tmp_path / 'ran'}",)


NAMES = "builtins.eval builtins.exec builtins.getattr builtins.__import__ subprocess.Popen os.popen".split()


@pytest.mark.parametrize("name", NAMES)
def test_no_callable_is_reached(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    data = f'c{module}\n{attribute}\n(S\'open("{tmp_path}/ran", "w")\'\ntR.'.encode()
    assert isinstance(read_pickle(data, {}, "a file"), Opaque)
    assert list(tmp_path.iterdir()) == []


def test_what_checkpoints_hold_survives() -> None:
    content = {
        "args": argparse.Namespace(num_layers=4, path=Path("a/b"), many=[1, 2.5, None, True, "x", b"y"]),
        "ordered": collections.OrderedDict(a=1),
        "sets": [{1, 2}, frozenset({3})],
    }
    assert read_pickle(pickle.dumps(content), {}, "a file") == content


def test_unknown_objects_keep_their_state() -> None:
    process: subprocess.CompletedProcess[str] = subprocess.CompletedProcess(["x"], 3)
    found = read_pickle(pickle.dumps(process), {}, "a file")
    assert isinstance(found, Opaque)
    assert found.state == {"args": ["x"], "returncode": 3, "stdout": None, "stderr": None}


def test_unknown_containers_drop_their_items() -> None:
    found = read_pickle(pickle.dumps(collections.deque([1, 2])), {}, "a file")
    assert repr(found) == "<collections.deque>"


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps(list(range(1000)))[:-7], b"\x80\x05K\x01", b"0."])
def test_damage_is_one_error(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here cannot be read: [A-Z]\w+"):
        read_pickle(data, {}, "here")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "LONG_BINPUT of 2147483647 in 9 bytes"),
        (b"]p4000000000\n.", "PUT of 4000000000 in 14 bytes"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"a.", "BINBYTES8 of 1099511627776 in 13 bytes"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"a.", "BYTEARRAY8 of 1099511627776 in 13 bytes"),
        (b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.", "FRAME of 1099511627776 in 13 bytes"),
        (b"X\xff\xff\xff\x7fabc.", "BINUNICODE of 2147483647 in 9 bytes"),
    ],
)
def test_a_small_pickle_gets_no_memory_for_a_large_one(data: bytes, says: str) -> None:
    """CPython allocates, and fills, an array up to the largest memo number: 32 GiB for the first of these."""
    with pytest.raises(CheckpointError, match=says):
        read_pickle(data, {}, "here")


def test_a_list_is_not_copied_over_and_over() -> None:
    many = b"(" + b"N" * 10_000 + b"l" + b"q\x00"  # a list of 10,000, remembered
    copy = b"cbuiltins\nlist\n(h\x00tR0"
    read_pickle(many + copy * 3 + b"h\x00.", {}, "here")
    with pytest.raises(CheckpointError, match="it copies the same items too often"):
        read_pickle(many + copy * 10_000 + b"h\x00.", {}, "here")


def test_a_state_is_not_copied_over_and_over() -> None:
    state = b"(d" + b"".join(b"S'%d'\nNs" % n for n in range(2_000)) + b"q\x00"  # 2,000 attributes, remembered
    made = b"cargparse\nNamespace\n)\x81h\x00b0"
    assert vars(read_pickle(b"\x80\x02" + state + made[:-1] + b".", {}, "here")) == {str(n): None for n in range(2_000)}
    with pytest.raises(CheckpointError, match="it copies the same items too often"):
        read_pickle(b"\x80\x02" + state + made * 2_000 + b"N.", {}, "here")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_scan_of_sizes_knows_every_protocol(protocol: int) -> None:
    """Texts and bytes of all lengths, numbers, more than 256 remembered objects."""
    content = {
        "texts": ["\u00fc" * n for n in (0, 1, 100, 300, 70_000)],
        "numbers": [0, 255, 65_535, -1, 2**31, 2**70, -(2**70), 1.5, True, None],
        "many": [[str(n)] for n in range(1_000)],
    }
    if protocol > 2:
        content["bytes"] = [b"r" * n for n in (0, 1, 300, 70_000)]
    assert read_pickle(pickle.dumps(content, protocol), {}, "here") == content
