"""The product itself on four ranks of one GPU, and on one rank with NCCL.

Four expert-parallel ranks, bf16, with every way of balancing; the losses are those of the run in which nothing moves.
`tests/dist/test_one_gpu.py` trains two of these on two CPU ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_smartmoe.cost.fitted import Part
from tests.support import one_gpu_jobs
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can run"),
]
RANKS, ITERATIONS = 4, 6


@pytest.mark.usefixtures("gpu_ranks")
def test_balancing_changes_no_losses(tmp_path: Path) -> None:
    curves = {
        name: one_gpu_jobs.train(tmp_path / name.replace(" ", "-"), RANKS, "cuda:0", name, iterations=ITERATIONS)
        for name in one_gpu_jobs.TRAININGS
    }
    one_gpu_jobs.check_losses(curves, ITERATIONS)
    for name, parts in one_gpu_jobs.PARTS.items():
        one_gpu_jobs.check_account(tmp_path / name.replace(" ", "-"), ITERATIONS, parts=parts)


@pytest.mark.usefixtures("gpu_ranks")
def test_where_a_step_goes_adds_up_to_the_wall_clock(tmp_path: Path) -> None:
    """What the events say that a step took is what the log says, and no part of it is missing."""
    name, iterations = "exact replicas", 12
    one_gpu_jobs.train(tmp_path, RANKS, "cuda:0", name, iterations=iterations)
    record = one_gpu_jobs.check_account(tmp_path, iterations, parts=(Part.REPLICAS, Part.PLANNING))
    wall_s = [line["seconds_per_step"] for line in metrics(tmp_path) if "seconds_per_step" in line]
    share = record.step_NR.max(axis=1)[-len(wall_s) :].sum() / sum(wall_s)
    print("result:", json.dumps({"what": "steps by CUDA events over wall time", "value": share, "unit": ""}))
    for part, seconds in zip(Part, record.seconds_NRP.mean(axis=(0, 1)).tolist(), strict=True):
        found = {"what": f"where a step goes: {part.name.lower()}", "value": seconds * 1e3, "unit": "ms"}
        print("result:", json.dumps(found))
    assert 0.5 < share < 1.05


@pytest.mark.usefixtures("gpu_ranks")
def test_a_checkpoint_of_moved_experts_resumes(tmp_path: Path) -> None:
    save = ("--save", str(tmp_path / "checkpoint"), "--save-interval", "3", "--ckpt-format", "torch_dist")
    name = "shuffled homes"
    whole = one_gpu_jobs.train(tmp_path / "whole", RANKS, "cuda:0", name, *save, iterations=3)
    load = ("--load", str(tmp_path / "checkpoint"))
    resumed = one_gpu_jobs.train(tmp_path / "resumed", RANKS, "cuda:0", name, *load, iterations=6)
    assert len(resumed) == 3
    assert resumed[-1] < whole[0]


def test_one_rank_trains_with_nccl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "1", "--run-dir", str(tmp_path)]
    mock_data = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
    flags = [*TINY_MODEL, *TINY_TRAINING, *mock_data, "--bf16", "--smartmoe", "--train-iters", str(ITERATIONS)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "nccl" in (tmp_path / "arguments.txt").read_text()
    curve = losses(tmp_path)
    assert len(curve) == ITERATIONS
    assert curve[-1] < curve[0]
