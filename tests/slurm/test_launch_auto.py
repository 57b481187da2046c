"""`--parallel auto` on an allocation: every node plans for itself, one prints, and all start the same launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.training import metrics

from .cluster import SlurmCluster
from .test_launch import BATCH_SCRIPT, TIMEOUT_S, assert_completed, from_anywhere, sbatch_options, tiny

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def test_two_nodes_start_one_plan(slurm: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--parallel", "auto", "--nproc", "1", "--run-dir", str(run_dir), *tiny(iterations=2)]
    options = sbatch_options(tmp_path, "--nodes", "2")
    job = slurm.sbatch(BATCH_SCRIPT, *options, *flags, env=from_anywhere(), cwd=tmp_path, timeout=TIMEOUT_S)
    assert_completed(job)
    assert job.stdout.count("smartmoe: --parallel auto\n") == 1, job.stdout[-6000:]
    assert "machine   2 x CPU-thread on 2 nodes, 6.0 GB each (cluster file cpu)\n" in job.stdout
    assert "kept      --micro-batch-size 1\n" in job.stdout
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["question"]["gpus"], plan["question"]["nodes"]) == (2, 2)
    assert len(metrics(run_dir)) == 2
