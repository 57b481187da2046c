"""Which checkpoint will be loaded, before anything starts: a tracker that is wrong lists what is there."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.flags.checkpoint_check import TRACKER, latest_checkpoint, saved_arguments
from megatron_smartmoe.errors import ConfigError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with checkpoints of iterations 5 and 10, by their folders alone."""
    for step in (5, 10):
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / TRACKER).write_text("10\n")
    return tmp_path


def load(directory: Path, ckpt_step: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(load=str(directory), ckpt_step=ckpt_step)


def test_the_tracker_decides_unless_a_flag_does(saved: Path) -> None:
    assert latest_checkpoint(load(saved)) == saved / "iter_0000010"
    assert latest_checkpoint(load(saved, 5)) == saved / "iter_0000005"


def test_no_checkpoint_is_a_start_from_nothing(tmp_path: Path) -> None:
    assert latest_checkpoint(load(tmp_path)) is None
    assert latest_checkpoint(load(tmp_path / "not there")) is None
    assert latest_checkpoint(argparse.Namespace(load=None, ckpt_step=None)) is None


def test_converted_weights_have_no_iteration(saved: Path) -> None:
    (saved / TRACKER).write_text("release")
    assert latest_checkpoint(load(saved)) is None


@pytest.mark.parametrize("content", ["", "abc", "-5", "1.5", "\u0663", "\x00", "x" * 10_000])
def test_a_tracker_without_a_number_lists_the_checkpoints(content: str, saved: Path) -> None:
    (saved / TRACKER).write_text(content)
    with pytest.raises(ConfigError) as caught:
        latest_checkpoint(load(saved))
    assert str(caught.value).startswith(f"{saved / TRACKER} = ")
    assert caught.value.rule == "must be the number of an iteration"
    assert caught.value.way_out == "Pass --ckpt-step 10 to resume from the newest one there (found: 10, 5)."
    assert len(str(caught.value)) < 600


def test_a_tracker_that_is_no_text(saved: Path) -> None:
    (saved / TRACKER).write_bytes(b"\xff\xfe1")
    with pytest.raises(ConfigError, match="must be the number of an iteration"):
        latest_checkpoint(load(saved))


def test_a_missing_folder_is_named(saved: Path) -> None:
    (saved / TRACKER).write_text("4242")
    with pytest.raises(ConfigError) as caught:
        latest_checkpoint(load(saved))
    assert str(caught.value) == (
        f"{saved / TRACKER} = '4242': there is no checkpoint {saved}/iter_0004242. "
        "Pass --ckpt-step 10 to resume from the newest one there (found: 10, 5)."
    )
    with pytest.raises(ConfigError, match=r"^--ckpt-step = 7: there is no checkpoint"):
        latest_checkpoint(load(saved, 7))


def test_nothing_there_at_all(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("5")
    with pytest.raises(ConfigError, match=r"There is none in .*: pass another --load, or leave it out"):
        latest_checkpoint(load(tmp_path))


def test_a_damaged_checkpoint_is_one_line_and_runs_nothing(saved: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {saved}/ran",)

    folder = saved / "iter_0000010"
    (folder / ".metadata").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ConfigError) as caught:
        saved_arguments(folder)
    assert not (saved / "ran").exists()
    assert str(caught.value) == (
        f"--load = '{saved}': {folder}/.metadata is damaged: it holds <posix.system>, where Metadata was expected. "
        "Restore the file. Pass --ckpt-step 5 to resume from the newest one there (found: 5)."
    )
