"""The tracker: whole or as it was, whatever happens while Megatron writes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_smartmoe.adapter.checkpoint.tracker import AtomicTracker
from megatron_smartmoe.checkpoint.directory import TRACKER, commit_tracker, prepare_tracker


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / TRACKER).write_text("5")
    return tmp_path


def files(failures: list[OSError]) -> AtomicTracker:
    return AtomicTracker(SimpleNamespace(open=open, os=os), failures.append)


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_it_moves_on_when_the_file_is_closed_and_not_before(directory: Path) -> None:
    opened = files([])
    with opened.open(str(directory / TRACKER), "w") as file:
        file.write("1")
        file.write("0")
        assert (directory / TRACKER).read_text() == "5"
    assert (directory / TRACKER).read_text() == "10"
    assert names(directory) == [TRACKER]
    with opened.open(str(directory / TRACKER), "r") as file:
        assert file.read() == "10"
    with opened.open(str(directory / "another file"), "w") as file:
        file.write("x")
    assert (directory / "another file").read_text() == "x"
    assert opened.os is os


def test_while_it_is_held_nothing_changes_until_it_is_committed(directory: Path) -> None:
    opened = files([])
    opened.is_held = True
    with opened.open(str(directory / TRACKER), "w") as file:
        file.write("10")
    assert (directory / TRACKER).read_text() == "5"
    prepare_tracker(directory, "10")
    assert (directory / TRACKER).read_text() == "5"
    commit_tracker(directory)
    assert (directory / TRACKER).read_text() == "10"


def test_a_full_disk_leaves_the_one_before(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    failures: list[OSError] = []
    with files(failures).open(str(directory / TRACKER), "w") as file:
        file.write("10")
    assert [error.errno for error in failures] == [errno.ENOSPC]
    assert (directory / TRACKER).read_text() == "5"
    assert names(directory) == [TRACKER]
