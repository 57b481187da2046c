"""Which checkpoint will be loaded, before anything starts: damage is one line that names a whole one and the flag."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.flags import checkpoint_check
from megatron_smartmoe.adapter.flags.checkpoint_check import latest_checkpoint, saved_arguments
from megatron_smartmoe.adapter.flags.resume import check_files, take_up_whole_checkpoint
from megatron_smartmoe.checkpoint.directory import TRACKER
from megatron_smartmoe.checkpoint.manifest import MANIFEST_FILE, Manifest, file_entries, write_manifest
from megatron_smartmoe.errors import ConfigError
from tests.support.checkpoint_files import checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with whole checkpoints of iterations 5 and 10."""
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    return tmp_path


def load(directory: Path | None, ckpt_step: int | None = None, **flags: str) -> argparse.Namespace:
    flags = {"smartmoe_resume": "newest", "smartmoe_checkpoint_check": "full", **flags}
    return argparse.Namespace(load=None if directory is None else str(directory), ckpt_step=ckpt_step, **flags)


def newest_whole(directory: Path, ckpt_step: int | None = None) -> argparse.Namespace:
    return load(directory, ckpt_step, smartmoe_resume="newest-whole")


def test_the_tracker_decides_unless_a_flag_does(saved: Path) -> None:
    assert latest_checkpoint(load(saved)) == saved / "iter_0000010"
    assert latest_checkpoint(load(saved, 5)) == saved / "iter_0000005"
    assert latest_checkpoint(newest_whole(saved)) == saved / "iter_0000010"


def test_no_checkpoint_is_a_start_from_nothing(tmp_path: Path) -> None:
    for args in (load(tmp_path), load(tmp_path / "not there"), load(None), newest_whole(tmp_path)):
        assert latest_checkpoint(args) is None
        assert check_files(args) == ()


def test_a_checkpoint_in_an_object_store_is_not_checked_and_that_is_said() -> None:
    args = argparse.Namespace(load="msc://bucket/run", smartmoe_checkpoint_check="full", smartmoe_resume="newest")
    assert check_files(args) == (
        "the checkpoint in msc://bucket/run is not checked: it is in no directory of this host",
    )


def test_converted_weights_have_no_iteration(saved: Path) -> None:
    (saved / TRACKER).write_text("release")
    (saved / "iter_0000005").rename(saved / "release")
    assert latest_checkpoint(load(saved)) is None
    assert check_files(load(saved)) == (
        "checkpoint release checked: 3 files, 333 bytes, sizes as in its manifest; each rank compares the checksums of "
        "what it reads",
    )


CONTENTS = ["", "abc", "-5", "1.5", "\u0663", "\x00", "x" * 10_000]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_tracker_without_a_number_lists_the_checkpoints(content: str, saved: Path) -> None:
    """Also with --ckpt-step: Megatron reads the tracker first, and ends."""
    (saved / TRACKER).write_text(content)
    for args in (load(saved), load(saved, 5)):
        with pytest.raises(ConfigError) as caught:
            latest_checkpoint(args)
        assert str(caught.value).startswith(f"{saved / TRACKER} = ")
        assert caught.value.rule == "must be the number of an iteration"
        assert caught.value.way_out == (
            f"Write a number to it (echo 10 > {saved / TRACKER}), or pass --smartmoe-resume newest-whole, to resume "
            "from iteration 10, the newest whole checkpoint (found: 10, 5)."
        )
        assert len(str(caught.value)) < 800


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
        "Pass --ckpt-step 10 to resume from the newest whole one there (found: 10, 5), or --smartmoe-resume "
        "newest-whole to do so by itself."
    )
    with pytest.raises(ConfigError, match=r"^--ckpt-step = 7: there is no checkpoint"):
        latest_checkpoint(load(saved, 7))


def test_nothing_there_at_all(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("5")
    with pytest.raises(ConfigError, match=r"There is none in .*: pass another --load, or leave it out"):
        latest_checkpoint(load(tmp_path))


def truncate(folder: Path) -> str:
    os.truncate(folder / "__1_0.distcp", 7)
    return "__1_0.distcp has 7 of 200 bytes"


def remove(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    (folder / "metadata.json").unlink()
    return "__0_0.distcp is missing (1 more file damaged)"


def spoil_manifest(folder: Path) -> str:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"iteration": 10', '"iteration": 11'))
    return f"{MANIFEST_FILE} is damaged: its content does not have the checksum that it holds"


@pytest.mark.parametrize("damage", [truncate, remove, spoil_manifest])
def test_damage_names_the_file_and_the_newest_whole_checkpoint(damage: Any, saved: Path) -> None:
    what = damage(saved / "iter_0000010")
    with pytest.raises(ConfigError) as caught:
        check_files(load(saved))
    assert str(caught.value) == (
        f"--load = '{saved}': iter_0000010 is damaged: {what}. Pass --ckpt-step 5 to resume from the newest whole one "
        "there (found: 5), or --smartmoe-resume newest-whole to do so by itself; 5 iterations of training are lost."
    )
    assert check_files(load(saved, smartmoe_checkpoint_check="off")) == ()


def test_newest_whole_goes_back_and_says_so(saved: Path) -> None:
    checkpoint(saved, 15)
    what = truncate(saved / "iter_0000010")
    (saved / "iter_0000015" / "__0_0.distcp").unlink()
    args = newest_whole(saved)
    assert check_files(args) == (
        f"iter_0000015: __0_0.distcp is missing, iter_0000010: {what}; resuming from iteration 5, the newest whole "
        "checkpoint; 10 iterations of training are lost",
        "checkpoint iter_0000005 checked: 3 files, 333 bytes, sizes as in its manifest; each rank compares the "
        "checksums of what it reads",
    )
    assert latest_checkpoint(args) == saved / "iter_0000005"
    take_up_whole_checkpoint(args)
    assert args.ckpt_step == 5
    assert (saved / TRACKER).read_text() == "15"  # the next save replaces it


def test_newest_whole_with_nothing_whole_is_refused(saved: Path) -> None:
    for step in (5, 10):
        truncate(saved / f"iter_{step:07d}")
    with pytest.raises(ConfigError) as caught:
        check_files(newest_whole(saved))
    assert str(caught.value) == (
        f"--load = '{saved}': iter_0000010: __1_0.distcp has 7 of 200 bytes, and no other checkpoint in it is whole. "
        "Restore the file, pass another --load, or leave it out to start from iteration 0."
    )
    with pytest.raises(ConfigError, match=r"There is no whole one \(damaged: 5\) in"):
        check_files(load(saved))


@pytest.mark.parametrize("content", CONTENTS)
def test_newest_whole_writes_a_tracker_that_megatron_would_end_on(content: str, saved: Path) -> None:
    (saved / TRACKER).write_text(content)
    args = newest_whole(saved)
    (line, _) = check_files(args)
    assert line.endswith("; resuming from iteration 10, the newest whole checkpoint")
    take_up_whole_checkpoint(args)
    assert (saved / TRACKER).read_text() == "10"
    assert args.ckpt_step == 10


def test_a_half_written_folder_is_not_the_newest_whole_one(saved: Path) -> None:
    """It may be newer than what the tracker names; without a manifest, nobody knows whether it is whole."""
    checkpoint(saved, 15, manifest=False)
    (saved / TRACKER).write_text("10")
    assert latest_checkpoint(newest_whole(saved)) == saved / "iter_0000010"
    truncate(saved / "iter_0000010")
    assert latest_checkpoint(newest_whole(saved)) == saved / "iter_0000005"


def test_folders_without_a_tracker(saved: Path) -> None:
    (saved / TRACKER).unlink()
    assert check_files(load(saved)) == (
        f"{saved} has no tracker ({TRACKER}): the saves of 10, 5 were not finished or the file was lost; training "
        "starts from iteration 0. To resume, pass --smartmoe-resume newest-whole or --ckpt-step N",
    )
    args = newest_whole(saved)
    assert check_files(args)[0] == (
        f"{saved} has no tracker ({TRACKER}), so no save in it was finished; resuming from iteration 10, the newest "
        "whole checkpoint"
    )


def test_a_damaged_checkpoint_is_one_line_and_runs_nothing(saved: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {saved}/ran",)

    folder = saved / "iter_0000010"
    (folder / MANIFEST_FILE).unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Planted()))
    error = (
        ".metadata is damaged: it holds <posix.system>, where Metadata was expected. {}"
        "Pass --ckpt-step 5 to resume from the newest whole one there (found: 5), or --smartmoe-resume newest-whole to "
        "do so by itself; 5 iterations of training are lost."
    )
    with pytest.raises(ConfigError) as caught:
        saved_arguments(folder)
    assert str(caught.value) == f"--load = '{saved}': {folder}/" + error.format("Restore the file. ")
    with pytest.raises(ConfigError) as caught:
        check_files(load(saved))
    assert str(caught.value) == f"--load = '{saved}': iter_0000010 is damaged: " + error.format("")
    assert not (saved / "ran").exists()


def test_arguments_and_placement_come_from_the_manifest(saved: Path) -> None:
    """The index, which is not even there, is not read."""
    folder = saved / "iter_0000010"
    placement = {"version": 1}
    manifest = Manifest(
        iteration=10,
        format="torch_dist",
        files=file_entries(folder),
        arguments={"train_iters": 12, "lr": 0.1},
        placement=placement,
    )
    write_manifest(folder, manifest)
    found = saved_arguments(folder)
    assert found is not None
    assert (found.train_iters, found.lr, found.smartmoe_placement) == (12, 0.1, placement)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_model_parallel_size": "2"}, "its arguments are damaged: expert_model_parallel_size = '2'"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size = 0"),
        ({"use_distributed_optimizer": 1}, "use_distributed_optimizer = 1"),
    ],
)
def test_arguments_of_another_type_are_one_line(
    saved: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    folder = saved / "iter_0000010"
    monkeypatch.setattr(checkpoint_check, "read_common", lambda _: {"args": argparse.Namespace(**changes)})
    with pytest.raises(ConfigError) as caught:
        saved_arguments(folder)
    assert message in str(caught.value)
    assert "--ckpt-step 5" in str(caught.value)


def test_an_argument_that_an_older_release_did_not_save_has_its_default(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_check, "read_common", lambda _: {"args": argparse.Namespace(no_save_optim=None)})
    found = saved_arguments(saved / "iter_0000010")
    assert found is not None
    assert (found.expert_model_parallel_size, found.expert_tensor_parallel_size, found.no_save_optim) == (
        1,
        None,
        False,
    )


def test_a_thousand_files_are_checked_by_looking_at_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is opened but the manifest and the tracker; `scripts/bench_checkpoint.py` measures it."""
    folder = checkpoint(tmp_path, 5, num_files=1000)
    opened: list[Path] = []
    original = Path.open

    def spy(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", spy)
    (line,) = check_files(load(tmp_path))
    assert line.startswith("checkpoint iter_0000005 checked: 1,001 files, ")
    assert set(opened) <= {tmp_path / TRACKER, folder / MANIFEST_FILE, folder / "metadata.json"}


def test_the_optimizer_state_of_another_gate_is_refused(tmp_path: Path) -> None:
    folder, args = saved_with_gate(tmp_path, {"smartmoe_gate": "noisy-top-k"})
    args.smartmoe_gate = "top-k"
    with pytest.raises(ConfigError) as refused:
        checkpoint_check.check_state(args)
    assert str(refused.value) == (
        f"--smartmoe-gate = 'top-k': the optimizer state in {folder} was saved with --smartmoe-gate noisy-top-k, whose "
        "routers have other parameters. Pass --no-load-optim for the weights alone, or --smartmoe-gate noisy-top-k."
    )
    args.no_load_optim = True
    checkpoint_check.check_state(args)
    args.no_load_optim, args.smartmoe_gate = False, "noisy-top-k"
    checkpoint_check.check_state(args)


def test_routers_with_other_rows_or_residuals_are_refused(tmp_path: Path) -> None:
    folder, args = saved_with_gate(tmp_path, {"smartmoe_gate": "moe++", "smartmoe_zero_experts": "zero=1"})
    args.smartmoe_gate, args.smartmoe_zero_experts, args.smartmoe_gate_residuals = "moe++", "zero=1", "on"
    with pytest.raises(ConfigError) as refused:
        checkpoint_check.check_state(args)
    assert str(refused.value) == (
        f"--smartmoe-gate-residuals = 'on': the optimizer state in {folder} was saved with --smartmoe-gate-residuals "
        "off, whose routers have other parameters. Pass --no-load-optim for the weights alone, or "
        "--smartmoe-gate-residuals off."
    )
    args.smartmoe_gate_residuals = "off"
    checkpoint_check.check_state(args)
    args.smartmoe_zero_experts, args.no_load_optim = "zero=1,copy=1", True
    with pytest.raises(ConfigError) as refused:
        checkpoint_check.check_state(args)
    assert str(refused.value) == (
        f"--smartmoe-zero-experts = 'zero=1,copy=1': the routers in {folder} have rows for zero=1. Pass "
        "--smartmoe-zero-experts zero=1."
    )


def saved_with_gate(tmp_path: Path, saved: dict[str, object]) -> tuple[Path, argparse.Namespace]:
    """A checkpoint of a run with these arguments, and arguments of a run that loads it."""
    folder = checkpoint(tmp_path, 5, manifest=False)
    manifest = Manifest(iteration=5, format="torch_dist", files=file_entries(folder), arguments=saved)
    write_manifest(folder, manifest)
    args = load(tmp_path)
    vars(args).update(
        {"num_experts": 8, "expert_model_parallel_size": 1, "ckpt_format": "torch_dist"},
        **dict.fromkeys("finetune no_load_optim use_distributed_optimizer no_load_rng".split(), False),
        override_opt_param_scheduler=True,
    )
    return folder, args
