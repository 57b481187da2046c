"""The same launcher on a GPU: NCCL, and nothing of the CPU facade."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can run"),
]
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_one_gpu_trains(precision: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "1", "--run-dir", str(tmp_path)]
    flags = [*TINY_MODEL, *TINY_TRAINING, *MOCK_DATA, *precision, "--train-iters", "6"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "no GPU" not in done.stdout
    arguments = (tmp_path / "arguments.txt").read_text()
    assert "distributed_backend ............................. nccl" in arguments
    curve = losses(tmp_path)
    assert len(curve) == 6
    assert curve[-1] < curve[0] - 0.2


def test_a_cuda_graph_of_the_iteration_trains_as_without(tmp_path: Path) -> None:
    """Of experts that are padded to capacity; after two iterations that warm up, the others are replays."""
    padded = "--bf16 --smartmoe --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity".split()
    padded += ["--no-check-for-nan-in-loss-and-grad", "--train-iters", "6"]
    graph = "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 2".split()
    curves = []
    for name, flags in (("without", padded), ("graph", [*padded, *graph])):
        run_dir = tmp_path / name
        command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", "--nproc", "1", "--run-dir", str(run_dir)]
        done = subprocess.run(
            [*command, *TINY_MODEL, *TINY_TRAINING, *MOCK_DATA, *flags],
            capture_output=True,
            text=True,
            timeout=45,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        curves.append(losses(run_dir))
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
