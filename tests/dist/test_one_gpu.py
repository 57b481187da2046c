"""Several ranks under NCCL's rules, carried by gloo (`tests.support.one_gpu`): what runs on one GPU, on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import one_gpu_jobs, ranks
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def test_operations_behave_as_those_of_nccl(tmp_path: Path) -> None:
    results = run_ranks(one_gpu_jobs.semantics, 3, "cpu", log_dir=tmp_path)
    one_gpu_jobs.check_semantics(results, "cpu")


def test_replicas(tmp_path: Path) -> None:
    one_gpu_jobs.check_replicas(run_ranks(one_gpu_jobs.replicas, one_gpu_jobs.RANKS, "cpu", log_dir=tmp_path))


def test_rows(tmp_path: Path) -> None:
    one_gpu_jobs.check_rows(run_ranks(one_gpu_jobs.rows, 3, "cpu", log_dir=tmp_path))


def test_a_missing_wait_shows_as_wrong_replicas(tmp_path: Path) -> None:
    results = run_ranks(one_gpu_jobs.replicas, one_gpu_jobs.RANKS, "cpu", "no wait", log_dir=tmp_path)
    with pytest.raises(AssertionError):
        one_gpu_jobs.check_replicas(results)


def test_a_missing_wait_shows_as_wrong_rows(tmp_path: Path) -> None:
    results = run_ranks(one_gpu_jobs.rows, 3, "cpu", "no wait", log_dir=tmp_path)
    with pytest.raises(AssertionError):
        one_gpu_jobs.check_rows(results)


@pytest.mark.parametrize("distributed", [False, True], ids=["EP2", "EP2 x EDP2, distributed optimizer"])
def test_migration(distributed: bool, tmp_path: Path) -> None:
    world_size = 4 if distributed else 2
    one_gpu_jobs.check_migration(
        run_ranks(one_gpu_jobs.migration, world_size, "cpu", distributed=distributed, log_dir=tmp_path)
    )


def test_training(tmp_path: Path) -> None:
    names, iterations = ("nothing moves", "all of it"), 3
    curves = {
        name: one_gpu_jobs.train(tmp_path / name.replace(" ", "-"), 2, "cpu", name, iterations=iterations)
        for name in names
    }
    one_gpu_jobs.check_losses(curves, iterations)
    for name, parts in one_gpu_jobs.PARTS.items():
        one_gpu_jobs.check_account(tmp_path / name.replace(" ", "-"), iterations, parts=parts)


@pytest.mark.long  # starts two more fork servers; who uses a GPU's notices without it
def test_ranks_that_use_a_gpu_have_no_facade_and_find_cuda_untouched(tmp_path: Path) -> None:
    """Everything is imported before they are forked; a process cannot use CUDA if its parent has initialized it."""
    with ranks.on_the_gpu():
        assert run_ranks(one_gpu_jobs.surroundings, 1, log_dir=tmp_path / "gpu") == [(False, False)]
    assert run_ranks(one_gpu_jobs.surroundings, 1, log_dir=tmp_path / "cpu") == [(True, False)]
