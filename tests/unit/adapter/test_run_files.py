"""Files of a run directory: whole or not at all, links replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.run_files import open_to_append, write_text


def test_a_link_is_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("written", "appended"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "written", "new")
    descriptor = open_to_append(tmp_path / "appended")
    os.write(descriptor, b"new")
    os.close(descriptor)
    assert victim.read_text() == "precious"
    assert [(tmp_path / name).read_text() for name in ("written", "appended")] == ["new", "new"]
    assert sorted(os.listdir(tmp_path)) == ["appended", "victim", "written"]


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    for text in (b"a", b"b"):
        descriptor = open_to_append(tmp_path / "file")
        os.write(descriptor, text)
        os.close(descriptor)
    assert (tmp_path / "file").read_text() == "ab"


def test_what_cannot_be_written_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "script", "true", mode=0o777)
    finally:
        os.umask(mask)
    assert (tmp_path / "script").stat().st_mode & 0o777 == 0o755
