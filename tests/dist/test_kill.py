"""kill -9 of a rank in the middle of training: the same command resumes from the checkpoint with the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.training import TINY_MODEL, TINY_TRAINING, metrics, train

pytestmark = pytest.mark.dist

ITERATIONS = 15
FLAGS = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
SAVING = ["--save", "{run_dir}/checkpoints", "--load", "{run_dir}/checkpoints", "--save-interval", "5"]


def launcher(run_dir: Path, data_flags: list[str]) -> list[str]:
    """The command that a user would give, twice the same."""
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "2", "--run-dir", str(run_dir)]
    return [*command, *TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS, *SAVING, "--train-iters", str(ITERATIONS)]


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    """Wait until the first checkpoint is complete and at least one iteration has followed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "training ended before it could be killed"
        done = (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
        if done and metrics(run_dir)[-1]["iteration"] > 5:
            return
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


def last_line(run_dir: Path) -> str:
    """The last line that a person sees."""
    return (run_dir / "train.log").read_text().splitlines()[-1]


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes below a launcher."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [
        child
        for child in children
        if "--num-layers" in child.cmdline() and "megatron_smartmoe.adapter.launch.torchrun" not in child.cmdline()
    ]


def test_a_killed_run_resumes_exactly(tmp_path: Path, data_flags: list[str]) -> None:
    run_dir = tmp_path / "killed"
    process = subprocess.Popen(launcher(run_dir, data_flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(run_dir, process)
    victims = ranks_of(process)
    assert len(victims) == 2
    victims[1].kill()
    assert process.wait(120) == 128 + signal.SIGKILL
    died = [line for line in last_line(run_dir).split(" | ") if line]
    assert died[0] == f"smartmoe: rank 1 on {os.uname().nodename} was killed by SIGKILL"
    assert died[1].startswith("it was in iteration ")
    assert died[2] in [f"saved: iteration {saved} in {run_dir}/checkpoints" for saved in (5, 10)]
    assert died[3] == f"to continue: scripts/pretrain_gpt_moe.sh --run-dir {run_dir}"

    survived = len(metrics(run_dir))
    assert survived < ITERATIONS
    done = subprocess.run(launcher(run_dir, data_flags), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    whole = train(tmp_path / "whole", 2, data_flags, *FLAGS, iterations=ITERATIONS)
    lines = metrics(run_dir)
    assert lines[survived]["iteration"] in (6, 11)  # right after a checkpoint
    assert lines[-1]["iteration"] == ITERATIONS
    assert all(line["lm loss"] == whole[line["iteration"] - 1] for line in lines)  # before and after the kill


def test_no_rank_outlives_the_launcher(tmp_path: Path, data_flags: list[str]) -> None:
    """SIGTERM to the launcher ends every rank."""
    process = subprocess.Popen(
        launcher(tmp_path / "run", data_flags),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    wait_for_checkpoint(tmp_path / "run", process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) != 0
    assert last_line(tmp_path / "run").startswith("smartmoe: ended by SIGTERM | saved: iteration ")
    _, alive = psutil.wait_procs(children, timeout=35)
    assert not alive
