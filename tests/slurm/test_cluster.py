"""The fake cluster itself: tasks run on the nodes that Slurm names, jobs report their end, nothing outlives it."""

import socket
from pathlib import Path

import pytest

from . import cluster as cluster_module
from .cluster import ClusterError, SlurmCluster

pytestmark = pytest.mark.slurm


def write_script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return path


def require_slurm() -> None:
    if reason := cluster_module.missing_requirement():
        pytest.skip(f"no Slurm here: {reason}")


def test_srun_places_two_tasks_on_each_of_two_nodes(slurm: SlurmCluster) -> None:
    slurm.wait_until_idle()  # jobs of earlier tests may still be leaving their nodes
    line = "echo $SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $SLURMD_NODENAME"
    done = slurm.run("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", line)
    assert sorted(done.stdout.splitlines()) == ["0 0 0 n1", "1 0 1 n1", "2 1 0 n3", "3 1 1 n3"]  # of one switch


def test_a_batch_job_runs_to_its_end_with_steps_and_arguments(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "job.sh", "#SBATCH -N2 --ntasks-per-node=1", 'echo "$GREETING $1"', "srun --label hostname"
    )
    job = slurm.sbatch(script, "--", "world", env={"GREETING": "hello"}, cwd=tmp_path)
    host = socket.gethostname()
    assert (job.state, job.exit_code, job.exit_signal) == ("COMPLETED", 0, 0)
    assert sorted(job.stdout.splitlines()) == [f"0: {host}", f"1: {host}", "hello world"]


def test_a_failing_batch_job_reports_its_exit_code(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = slurm.sbatch(write_script(tmp_path / "job.sh", "echo before", "exit 7"), cwd=tmp_path)
    assert (job.state, job.exit_code, job.stdout) == ("FAILED", 7, "before\n")


def test_a_job_that_asks_to_be_requeued_is_followed_to_its_second_end(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "job.sh",
        "#SBATCH --requeue --open-mode=append",
        'echo "restarts: ${SLURM_RESTART_COUNT:-unset}"',
        '[[ -n "${SLURM_RESTART_COUNT:-}" ]] || { scontrol requeue "$SLURM_JOB_ID"; sleep 60; }',
    )
    job = slurm.sbatch(script, cwd=tmp_path)
    assert job.state == "COMPLETED"
    assert job.record["Restarts"] == "1"
    assert [line for line in job.stdout.splitlines() if "restarts" in line] == ["restarts: unset", "restarts: 1"]


def test_a_job_past_its_deadline_is_cancelled_and_its_output_shown(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = slurm.submit(write_script(tmp_path / "job.sh", "echo stuck here", "sleep 600"), cwd=tmp_path)
    with pytest.raises(ClusterError, match=rf"end of job {job_id}: not within 2 s(.|\n)*stuck here"):
        slurm.wait(job_id, timeout=2)
    assert slurm.wait(job_id).state == "CANCELLED"


def test_nothing_is_left_running_after_the_cluster(tmp_path: Path) -> None:
    require_slurm()
    script = write_script(tmp_path / "job.sh", "trap '' TERM", "srun sleep 600")
    with SlurmCluster(tmp_path / "cluster", num_nodes=1) as cluster:
        cluster.submit(script, cwd=tmp_path)
        cluster.run("srun", "true")
        assert any("slurmstepd" in command for _, command in cluster.processes())
    assert cluster.processes() == []


def test_a_daemon_that_cannot_start_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_slurm()
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(cluster_module, "free_ports", lambda count: [port] * count)
        cluster = SlurmCluster(tmp_path, num_nodes=1)
        with pytest.raises(ClusterError, match=r"slurm(ctld|d-n1) \(status 1\)(.|\n)*Address already in use"):
            cluster.start()
    assert cluster.processes() == []
