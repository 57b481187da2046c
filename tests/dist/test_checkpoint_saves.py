"""Saves that lose nothing, and loads that notice what is not as it was saved."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.checkpoint.directory import TRACKER
from megatron_smartmoe.checkpoint.manifest import MANIFEST_FILE, check_files, read_manifest
from megatron_smartmoe.checkpoint.verify import verify
from scripts.reliability.fault_job import run_ranks_with
from scripts.reliability.fault_points import Order
from tests.support.ranks import run_ranks
from tests.support.replicas import ALWAYS
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, train

pytestmark = pytest.mark.dist

EP2 = "--expert-model-parallel-size 2".split()
SHARDED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
# Replicas from history in every iteration, and homes that move whenever they may.
LOOPS = [*ALWAYS, *"--smartmoe-homes-interval 2 --smartmoe-homes-horizon 1000000".split()]


class Saved:
    """A run of 6 steps that saved after steps 3 and 6."""

    def __init__(self, root: Path, data_flags: list[str]) -> None:
        self.directory, self.flags = root / "saved", [*data_flags, *EP2, *SHARDED, *LOOPS]
        self.losses = train(root / "run", 2, self.flags, *self.saving(self.directory), iterations=6)

    @staticmethod
    def saving(directory: Path) -> list[str]:
        return ["--save", str(directory), "--load", str(directory), "--save-interval", "3"]

    def copy(self, root: Path, tracker: str = "6") -> Path:
        directory: Path = shutil.copytree(self.directory, root / "saved")
        (directory / TRACKER).write_text(tracker)
        return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Saved:
    return Saved(tmp_path_factory.mktemp("saves"), data_flags)


def log(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / "ranks" / f"rank{rank}.log").read_text()


def test_files_hold_what_the_ranks_held(saved: Saved) -> None:
    """Digests of the ranks' memory and those of the files are computed by different code from different layouts."""
    for iteration in (3, 6):
        folder = saved.directory / f"iter_{iteration:07d}"
        found = verify(folder)
        assert found.is_whole
        manifest = read_manifest(folder)
        assert manifest is not None
        kinds = {entry.kind for entry in manifest.digests}
        assert kinds == {"weight", "main_weight", "exp_avg", "exp_avg_sq"}
        names = {file.name for file in manifest.files}
        assert {"smartmoe_homes.npz", "smartmoe_replicas_stage0_group0.npz", "__0_0.distcp", "__1_0.distcp"} <= names
        assert manifest.iteration == iteration
        assert manifest.placement is not None


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one_with_replicas(saved: Saved, tmp_path: Path) -> None:
    directory = saved.copy(tmp_path, tracker="3")
    resumed = train(tmp_path / "run", 2, saved.flags, "--load", str(directory), iterations=6)
    assert resumed == saved.losses[3:]
    text = log(tmp_path / "run")
    assert "replicas: continuing with the checkpoint's load history |" in text
    assert "weights, main weights and moments as loaded have the digests of the save: " in text


def test_a_finished_run_that_is_started_again_leaves_its_checkpoint_alone(saved: Saved, tmp_path: Path) -> None:
    directory = saved.copy(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}
    flags = ["--save", str(directory), "--load", str(directory), "--save-interval", "4"]  # 6 is none of its multiples
    argv = [*TINY_MODEL, *TINY_TRAINING, *saved.flags, *flags, "--train-iters", "6"]
    run_ranks(_main, 2, argv, log_dir=tmp_path / "run" / "ranks")
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}
    assert after == before
    assert f"checkpoint: {directory} has this iteration already, and it is left as it is |" in log(tmp_path / "run")


def test_a_flipped_bit_is_found_in_every_one_of_20_places(saved: Saved, tmp_path: Path) -> None:
    folder = saved.copy(tmp_path) / "iter_0000006"
    manifest, generator = read_manifest(folder), random.Random(5)
    assert manifest is not None
    shard = folder / "__1_0.distcp"
    content = shard.read_bytes()
    for place in [0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(18))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        shard.write_bytes(flipped)
        (damage,) = check_files(folder, manifest)
        assert str(damage) == "__1_0.distcp has other bytes than were saved (its checksum differs)"
    shard.write_bytes(content)
    assert not check_files(folder, manifest)


def test_a_damaged_shard_ends_the_ranks_in_one_line_or_is_gone_back_from(saved: Saved, tmp_path: Path) -> None:
    directory = saved.copy(tmp_path)
    shard = directory / "iter_0000006" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(AssertionError):
        train(tmp_path / "refused", 2, saved.flags, "--load", str(directory), iterations=6)
    lines = [[line for line in log(tmp_path / "refused", rank).splitlines() if "error: " in line] for rank in (0, 1)]
    assert lines == [
        [
            f"error: --load = '{directory}': iter_0000006 is damaged: __1_0.distcp has other bytes than were saved "
            "(its checksum differs). Pass --ckpt-step 3 to resume from the newest whole one there (found: 3), or "
            "--smartmoe-resume newest-whole to do so by itself; 3 iterations of training are lost."
        ],
        [],
    ]
    newest_whole = ["--load", str(directory), "--smartmoe-resume", "newest-whole"]
    resumed = train(tmp_path / "resumed", 2, saved.flags, *newest_whole, iterations=6)
    assert resumed == saved.losses[3:]
    assert (
        "smartmoe: iter_0000006: __1_0.distcp has other bytes than were saved (its checksum differs); resuming from "
        "iteration 3, the newest whole checkpoint; 3 iterations of training are lost"
    ) in log(tmp_path / "resumed")


def test_a_load_that_goes_wrong_is_found_after_it(saved: Saved, tmp_path: Path) -> None:
    argv = [*TINY_MODEL, *TINY_TRAINING, *saved.flags, "--load", str(saved.directory), "--train-iters", "7"]
    argv += ["--override-opt-param-scheduler"]
    with pytest.raises(AssertionError):
        run_ranks(_load_wrong, 2, argv, log_dir=tmp_path / "ranks")
    folder = saved.directory / "iter_0000006"
    error = next(line for line in log(tmp_path).splitlines() if "error: " in line)
    assert error == (
        f"error: --load = '{saved.directory}': what was loaded from {folder} is not what was saved: "
        "decoder.layers.1.mlp.experts.linear_fc2.weight, expert 4, weight (and 1 more tensor) differs. Pass "
        "--ckpt-step N for another iteration, or --smartmoe-checkpoint-check sizes to train with it all the same."
    )
    assert "iteration        7/" not in log(tmp_path)


def _load_wrong(argv: list[str]) -> None:
    """A load that changes the last bit of one weight on rank 1."""
    from megatron_smartmoe.adapter.pretrain import choose_device, main

    choose_device("cpu")
    import torch
    from megatron.training import training

    load = training.load_checkpoint

    def wrong(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(model, *args, **kwargs)
        if torch.distributed.get_rank() == 1:
            weight = dict(model[0].named_parameters())["module.decoder.layers.1.mlp.experts.weight2"]
            weight.data.view(-1).view(torch.int32)[7] ^= 1
        return result

    training.load_checkpoint = wrong
    main(argv)


def _main(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    main(argv)


FORMATS = {
    "torch_dist": ([], "File too large"),
    "legacy": (["--ckpt-format", "torch"], "torch could not write a file (rank 0)"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(kind: str, tmp_path: Path, data_flags: list[str]) -> None:
    """The second of three saves meets a limit on the size of files; the run has the losses of one without a limit."""
    directory, run_dir = tmp_path / "saved", tmp_path / "run"
    flags = [*data_flags, *EP2, "--smartmoe", *FORMATS[kind][0]]
    argv = [*TINY_MODEL, *TINY_TRAINING, *flags, "--train-iters", "6", "--smartmoe-run-dir", str(run_dir)]
    saving = ["--save", str(directory), "--save-interval", "2"]
    run_ranks(_train_on_full_disk, 2, [*argv, *saving], log_dir=run_dir / "ranks")
    found = [line for line in log(run_dir).splitlines() if "not saved" in line]
    assert len(found) == 1
    assert found[0].startswith(f" smartmoe: iteration        4 | WARNING: checkpoint: not saved: {FORMATS[kind][1]}")
    assert found[0].endswith("its files are removed, iteration 2 stays the newest checkpoint, and training continues |")
    assert sorted(path.name for path in directory.iterdir()) == ["iter_0000002", "iter_0000006", TRACKER]
    assert (directory / TRACKER).read_text() == "6"
    (directory / TRACKER).write_text("2")
    resumed = train(tmp_path / "resumed", 2, flags, "--load", str(directory), iterations=6)
    assert resumed == losses(run_dir)[2:]


def _train_on_full_disk(argv: list[str]) -> None:
    import resource

    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    class FullDisk(Callback):
        def between_steps(self, iteration: int) -> None:
            limit = 300_000 if iteration == 4 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    main(argv, callbacks=[FullDisk()])


def test_a_save_is_finished_beside_the_training_whatever_ends_that(tmp_path: Path, data_flags: list[str]) -> None:
    """Digests that begin with the optimizer's step are of what was saved: it waits for them. And the second checkpoint
    comes into force although rank 1 leaves the training by an exception before that step."""
    directory = tmp_path / "saved"
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *EP2, *SHARDED, "--smartmoe", "--train-iters", "6"]
    argv += ["--save", str(directory), "--save-interval", "2"]
    with pytest.raises(AssertionError, match="this ends the training of this rank"):
        run_ranks(_train_with_late_digests, 2, argv, log_dir=tmp_path / "ranks")
    assert (directory / TRACKER).read_text() == "4"
    for iteration in (2, 4):
        manifest = read_manifest(folder := directory / f"iter_{iteration:07d}")
        assert manifest is not None
        assert manifest.digests
        assert manifest.consumed_samples == iteration * 4  # not of the step that was under way
        assert verify(folder).is_whole
        assert f"iteration {iteration:8d} | checkpoint: complete, and the tracker names it" in log(tmp_path)


def _train_with_late_digests(argv: list[str]) -> None:
    """Digests are computed when the optimizer waits for them; if it does not, after its step."""
    from megatron_smartmoe.adapter.checkpoint.digests import LocalDigests
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.pretrain import main

    begin = threading.Event()
    compute, wait = LocalDigests._compute_on_host, LocalDigests.wait

    def late(self: LocalDigests) -> None:
        begin.wait(2)
        begin.clear()
        compute(self)

    def waited(self: LocalDigests) -> None:
        begin.set()
        wait(self)

    class Steps(Callback):
        def before_step(self, iteration: int) -> None:
            if iteration == 5 and int(os.environ["RANK"]) == 1:
                raise RuntimeError("this ends the training of this rank")

        def after_step(self, iteration: int, losses: Any) -> None:
            begin.set()

        def between_steps(self, iteration: int) -> None:
            begin.clear()

    LocalDigests._compute_on_host, LocalDigests.wait = late, waited  # type: ignore[method-assign]
    main(argv, callbacks=[Steps()])


@pytest.mark.parametrize(("point", "victim"), [("save: checksums", 1), ("save: manifest", 0)])
def test_a_rank_that_is_killed_behind_a_save_leaves_the_checkpoint_before_it(
    point: str, victim: int, tmp_path: Path, data_flags: list[str]
) -> None:
    directory, flags = tmp_path / "saved", [*data_flags, *EP2, "--smartmoe"]
    argv = [*TINY_MODEL, *TINY_TRAINING, *flags, "--save", str(directory), "--save-interval", "2", "--train-iters", "6"]
    marker = str(tmp_path / "struck")
    order = Order(action="kill", point=point, victim=victim, iteration=4, seconds=0, mount="", marker=marker)
    end = run_ranks_with(argv, 2, tmp_path / "ranks", order)
    assert end.struck
    assert end.status[victim] == -signal.SIGKILL
    assert (directory / TRACKER).read_text() == "2"
    assert not (directory / "iter_0000004" / MANIFEST_FILE).exists()
    if victim == 0:
        return  # what is on the disk is the same
    train(tmp_path / "resumed", 2, flags, "--load", str(directory), iterations=6)
    assert (
        f"smartmoe: {directory} has checkpoints newer than iteration 2 that are not used (half-written: 4); training "
        "replaces those whose iterations it saves\n"
    ) in log(tmp_path / "resumed")
