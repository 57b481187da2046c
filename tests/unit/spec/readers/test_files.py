"""Opening a file: everything that can be wrong with it is one line that names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named


def named(path: Path) -> Named:
    return Named(path=path, field="--file", way_out="Give another.")


def message_of(path: Path, most_bytes: int = 100) -> str:
    with pytest.raises(ConfigError) as caught:
        files.read_text(named(path), most_bytes)
    return str(caught.value).replace(str(path), "PATH")


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    assert message_of(tmp_path / "a") == "--file = 'PATH': does not exist. Give another."
    assert message_of(tmp_path) == "--file = 'PATH': is a directory. Give another."
    os.mkfifo(tmp_path / "fifo")
    assert message_of(tmp_path / "fifo") == "--file = 'PATH': is not a regular file. Give another."
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read: Too many levels of symbolic links" in message_of(tmp_path / "loop")
    assert "cannot be read: File name too long" in message_of(tmp_path / ("x" * 300))
    assert "cannot be read: embedded null byte" in message_of(tmp_path / "a\0b")
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert message_of(tmp_path / "large") == "--file = 'PATH': is larger than 9.53674e-05 MiB. Give another."


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffé".encode())
    assert files.read_text(named(path)) == "é"
    path.write_bytes("a: 1".encode("utf-16"))
    assert message_of(path) == "--file = 'PATH': is UTF-16 text, and must be UTF-8. Give another."
    path.write_bytes(b"a\nb \xe9 c\n")
    assert message_of(path) == (
        "PATH:2 = 'b \\\\xe9 c': is not UTF-8 text: byte 0xe9. Save the file as UTF-8, or correct line 2."
    )


def test_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" + b"b" * 50 + b"\nc")
    assert [number for number, _ in files.read_lines(named(path))] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"lines:2 = b'b+': is longer than"):
        list(files.read_lines(named(path), 20))
