"""`--parallel auto` on an allocation: every node plans for itself, one prints, and all start the same launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .jobs import EP2_PP2, LAUNCHER, ROOT, TIMEOUT_S, assert_completed, assert_same_run, own_port, sbatch_options, tiny

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def test_two_nodes_of_two_to_four_start_one_plan(slurm: SlurmCluster, tmp_path: Path, expected: list[float]) -> None:
    """A batch script of one's own asks for 2 to 4 nodes and gets 2: the launcher in it plans for these, and trains."""
    run_dir = tmp_path / "run"
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexec {LAUNCHER} "$@"\n')
    flags = ["--parallel", "auto", "--nproc", "2", "--run-dir", str(run_dir), *tiny(*EP2_PP2)]
    options = sbatch_options(tmp_path, "--nodes", "2-4", "--ntasks-per-node", "1")
    slurm.run("scontrol", "update", "NodeName=n2,n4", "State=DRAIN", "Reason=test")
    try:
        job = slurm.sbatch(script, *options, *flags, env=own_port(), cwd=ROOT, timeout=TIMEOUT_S)
    finally:
        slurm.run("scontrol", "update", "NodeName=n2,n4", "State=RESUME")
    assert_completed(job)
    assert_same_run(run_dir, job.stdout, expected)
    assert job.stdout.count("smartmoe: 4 ranks on 2 nodes") == 1
    assert job.stdout.count("smartmoe: --parallel auto\n") == 1, job.stdout[-6000:]
    assert "machine   4 x CPU-thread on 2 nodes, 6.0 GB each (cluster file cpu)\n" in job.stdout
    assert "kept      --pipeline-model-parallel-size 2, --num-virtual-stages-per-pipeline-rank 2, " in job.stdout
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["question"]["gpus"], plan["question"]["nodes"]) == (4, 2)
    assert "Finished after" in (run_dir / "train.log").read_text()
    assert (run_dir / "node1.log").is_file()
