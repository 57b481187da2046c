"""Replicas, exchanges of rows and migrations between ranks, on CUDA tensors of one GPU.

NCCL refuses several ranks on one device, so its semantics are carried by gloo (`tests.support.one_gpu`): streams,
lifetimes of buffers and missing waits are those of a GPU. `tests/dist/test_one_gpu.py` runs the same on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import one_gpu_jobs
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can run"),
    pytest.mark.usefixtures("gpu_ranks"),
]
DEVICE = "cuda:0"


def test_operations_behave_as_those_of_nccl(tmp_path: Path) -> None:
    one_gpu_jobs.check_semantics(run_ranks(one_gpu_jobs.semantics, 3, DEVICE, log_dir=tmp_path), DEVICE)


def test_replicas(tmp_path: Path) -> None:
    one_gpu_jobs.check_replicas(run_ranks(one_gpu_jobs.replicas, one_gpu_jobs.RANKS, DEVICE, log_dir=tmp_path))


def test_rows(tmp_path: Path) -> None:
    one_gpu_jobs.check_rows(run_ranks(one_gpu_jobs.rows, 3, DEVICE, log_dir=tmp_path))


def test_a_missing_wait_shows_as_wrong_rows(tmp_path: Path) -> None:
    results = run_ranks(one_gpu_jobs.rows, 3, DEVICE, "no wait", log_dir=tmp_path)
    with pytest.raises(AssertionError):
        one_gpu_jobs.check_rows(results)


@pytest.mark.parametrize("distributed", [False, True], ids=["EP2", "EP2 x EDP2, distributed optimizer"])
def test_migration(distributed: bool, tmp_path: Path) -> None:
    ranks = 4 if distributed else 2
    one_gpu_jobs.check_migration(
        run_ranks(one_gpu_jobs.migration, ranks, DEVICE, distributed=distributed, log_dir=tmp_path)
    )
