"""kill -9 of a rank in the middle of training: the same command resumes from the checkpoint with the same losses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.training import TINY_MODEL, TINY_TRAINING, metrics, train

pytestmark = pytest.mark.dist

ITERATIONS = 30  # more than either start reaches
FLAGS = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
SAVING = ["--save", "{run_dir}/checkpoints", "--load", "{run_dir}/checkpoints", "--save-interval", "5"]


def launcher(run_dir: Path, data_flags: list[str]) -> list[str]:
    """The command that a user would give, twice the same."""
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "2", "--run-dir", str(run_dir)]
    return [*command, *TINY_MODEL, *TINY_TRAINING, *data_flags, *FLAGS, *SAVING, "--train-iters", str(ITERATIONS)]


def start(run_dir: Path, data_flags: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(launcher(run_dir, data_flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_iteration(
    run_dir: Path, process: subprocess.Popen[bytes], iteration: int, *, after: int = 0, timeout_s: float = 120
) -> None:
    """Wait until a line of the metrics after the first `after` ones is of this iteration or a later one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "training ended before it could be killed"
        lines = metrics(run_dir)[after:] if (run_dir / "metrics.jsonl").exists() else []
        if any(line["iteration"] >= iteration for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError("no such iteration in time")


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


def test_a_killed_run_resumes_exactly_and_none_outlives_its_launcher(tmp_path: Path, data_flags: list[str]) -> None:
    """A rank of the first start is killed; the second start resumes, and SIGTERM to its launcher ends every rank."""
    run_dir = tmp_path / "killed"
    process = start(run_dir, data_flags)
    wait_for_iteration(run_dir, process, 6)
    victims = ranks_of(process)
    assert len(victims) == 2
    victims[1].kill()
    assert process.wait(120) == 128 + signal.SIGKILL
    died = [line for line in last_line(run_dir).split(" | ") if line]
    assert died[0] == f"smartmoe: rank 1 on {os.uname().nodename} was killed by SIGKILL"
    assert died[1].startswith("it was in iteration ")
    saved = re.fullmatch(rf"saved: iteration (\d+) in {run_dir}/checkpoints", died[2])
    assert saved is not None
    assert died[3] == f"to continue: scripts/pretrain_gpt_moe.sh --run-dir {run_dir}"

    survived = len(metrics(run_dir))
    process = start(run_dir, data_flags)
    wait_for_iteration(run_dir, process, int(saved[1]) + 1, after=survived)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) != 0
    assert last_line(run_dir).startswith("smartmoe: ended by SIGTERM | saved: iteration ")
    _, alive = psutil.wait_procs(children, timeout=35)
    assert not alive

    lines = metrics(run_dir)
    assert lines[survived]["iteration"] == int(saved[1]) + 1  # right after the checkpoint
    whole = train(tmp_path / "whole", 2, data_flags, *FLAGS, iterations=ITERATIONS)
    assert all(line["lm loss"] == whole[line["iteration"] - 1] for line in lines)  # before and after the kill
