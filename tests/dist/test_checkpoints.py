"""torch_dist checkpoints: save, be killed, resume; resume at another parallelism."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.test_parallel_equality import largest_difference
from tests.support.marks import some_fast
from tests.support.training import TINY_MODEL, TINY_TRAINING, train

pytestmark = pytest.mark.dist

EP2 = "--expert-model-parallel-size 2".split()
FROM_EP2 = {
    "EP4": (4, "--expert-model-parallel-size 4"),
    "EP2xPP2": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "EP2xTP2": (4, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "EP2xEDP2": (4, "--expert-model-parallel-size 2"),
}
OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}


class Saved:
    """A run of 8 steps at EP2 that saved after step 4, and where."""

    def __init__(self, root: Path, data_flags: list[str], initial_weights: list[str], optimizer: str) -> None:
        self.flags = [*data_flags, *OPTIMIZERS[optimizer]]
        self.checkpoint = root / "checkpoint"
        save = ["--save", str(self.checkpoint), "--save-interval", "4", *EP2]
        self.losses = train(root / "whole", 2, self.flags, *initial_weights, *save, iterations=8)
        (self.checkpoint / "latest_checkpointed_iteration.txt").write_text("4")  # as if killed before step 8

    def resume(self, run_dir: Path, world_size: int, *flags: str) -> list[float]:
        """The losses of steps 5 to 8 after loading."""
        return train(run_dir, world_size, self.flags, "--load", str(self.checkpoint), *flags, iterations=8)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def saved(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    data_flags: list[str],
    initial_weights: list[str],
) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"), data_flags, initial_weights, request.param)


@pytest.mark.parametrize("saved", some_fast(OPTIMIZERS, "distributed"), indirect=True, scope="module")
def test_resumed_losses_are_bit_equal(saved: Saved, tmp_path: Path) -> None:
    assert saved.resume(tmp_path, 2, *EP2) == saved.losses[4:]


@pytest.mark.parametrize(
    ("saved", "mix"),
    [
        pytest.param(optimizer, mix, marks=[] if mix == "EP4" or optimizer == "distributed" else [pytest.mark.long])
        for optimizer in OPTIMIZERS
        for mix in FROM_EP2
    ],
    indirect=["saved"],
    scope="module",
)
def test_resumed_at_another_parallelism(saved: Saved, mix: str, tmp_path: Path) -> None:
    world_size, flags = FROM_EP2[mix]
    losses = saved.resume(tmp_path, world_size, *flags.split())
    assert largest_difference(losses, saved.losses[4:]) < 1e-6


def launch(
    saved: Saved | argparse.Namespace, tmp_path: Path, nproc: str, *flags: str
) -> subprocess.CompletedProcess[str]:
    """The launcher on the saved checkpoint."""
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", nproc]
    command += ["--run-dir", str(tmp_path / "run")]
    flags = (*TINY_MODEL, *TINY_TRAINING, *saved.flags, "--load", str(saved.checkpoint), *flags)
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("saved", ["distributed"], indirect=True, scope="module")
def test_a_longer_run_has_to_choose_its_schedule(saved: Saved, tmp_path: Path) -> None:
    done = launch(saved, tmp_path, "2", *EP2, "--train-iters", "9")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --train-iters = 9 (command line): the learning-rate schedule in "
        f"{saved.checkpoint / 'iter_0000004'} was made with 8. "
        "Add --override-opt-param-scheduler for the schedule of these flags, or --use-checkpoint-opt-param-scheduler "
        "for the saved one.\n"
    )
    longer = ["--load", str(saved.checkpoint), *EP2, "--override-opt-param-scheduler"]
    assert len(train(tmp_path / "longer", 2, saved.flags, *longer, iterations=9)) == 5


@pytest.mark.parametrize("saved", ["distributed"], indirect=True, scope="module")
def test_optimizer_state_between_ep_1_and_more_is_refused_before_it_fails(saved: Saved, tmp_path: Path) -> None:
    """Megatron keeps the experts' optimizer apart only under expert parallelism."""
    done = launch(saved, tmp_path, "1", "--train-iters", "8")
    assert done.returncode == 2
    folder = saved.checkpoint / "iter_0000004"
    assert done.stderr == (
        f"error: --expert-model-parallel-size = 1: the optimizer state in {folder} was saved at 2, "
        "and cannot be loaded at 1, because experts have an optimizer of their own only above 1. "
        "Pass --expert-model-parallel-size 2, --no-load-optim for the weights alone, or load what this writes: "
        f"smartmoe convert {folder} NEW --to megatron --ep 1\n"
    )
    weights_only = saved.resume(tmp_path / "weights", 1, "--no-load-optim", "--no-load-rng")
    assert largest_difference(weights_only[:1], saved.losses[4:5]) < 1e-6  # the first loss needs no optimizer


@pytest.mark.parametrize("saved", ["distributed"], indirect=True, scope="module")
def test_a_truncated_shard_is_refused_or_left_out(saved: Saved, tmp_path: Path) -> None:
    """By the launcher; what ranks do, and with which losses, tests/dist/test_checkpoint_saves.py shows."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(saved.checkpoint, directory)
    (directory / "latest_checkpointed_iteration.txt").write_text("8")
    shard = directory / "iter_0000008" / "__1_0.distcp"
    os.truncate(shard, 1000)
    there = argparse.Namespace(checkpoint=directory, flags=saved.flags)
    done = launch(there, tmp_path, "2", *EP2, "--train-iters", "8")
    assert done.returncode == 2
    what = r"__1_0\.distcp has 1,000 of (at least )?[\d,]+ bytes"
    assert re.fullmatch(
        rf"error: --load = '{directory}' \(command line\): iter_0000008 is damaged: {what}\. Pass --ckpt-step 4 to "
        r"resume from the newest whole one there \(found: 4\), or --smartmoe-resume newest-whole to do so by itself; "
        r"4 iterations of training are lost\.\n",
        done.stderr,
    )
    left_out = ["--smartmoe-resume", "newest-whole", "--dry-run"]
    done = launch(there, tmp_path, "2", *EP2, "--train-iters", "8", *left_out)
    assert done.returncode == 0, done.stderr
