"""What the batch script asks of Slurm, with a stand-in for the run: what it does when ranks die is another test's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .jobs import BATCH_SCRIPT, ROOT, Watched, assert_completed, sbatch_options

pytestmark = pytest.mark.slurm

CRASHED = f"""
import sys
import time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from megatron_smartmoe.adapter.launch.batch_job import BatchJob
from megatron_smartmoe.adapter.launch.deaths import Death
job = BatchJob.of_environment(Path(sys.argv[1]))
time.sleep(0.1)  # times of files are coarser than the clock
Path(sys.argv[1], "metrics.jsonl").touch()
job.note_crash(Death(rank=0, host="here", status=-9, time_s=0.0))
"""


def home_of(tmp_path: Path, run: str) -> dict[str, str]:
    """A checkout whose launcher runs these lines of a shell in a step."""
    home = tmp_path / "home"
    (home / "scripts").mkdir(parents=True)
    launcher = home / "scripts" / "pretrain_gpt_moe.sh"
    launcher.write_text(
        f'#!/bin/bash\nnodes="--nodes $SLURM_JOB_NUM_NODES --ntasks $SLURM_JOB_NUM_NODES"\n'
        f"exec srun $nodes --kill-on-bad-exit=1 ${{SMARTMOE_SRUN_ARGS:-}} bash {home}/run.sh\n"
    )
    launcher.chmod(0o755)
    (home / "crashed.py").write_text(CRASHED)
    (home / "run.sh").write_text(run.format(work=tmp_path, crashed=f"{sys.executable} {home}/crashed.py {tmp_path}"))
    return {"SMARTMOE_HOME": str(home)}


def test_a_node_that_lost_ranks_twice_is_excluded(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = 'echo "on $SLURMD_NODENAME"; [[ $SLURMD_NODENAME == n1 ]] || exit 0; {crashed}; exit 137'
    environ = home_of(tmp_path, run) | {"SMARTMOE_MAX_REQUEUES": "3"}
    options = sbatch_options(tmp_path, "--nodes", "1")
    job = slurm.sbatch(BATCH_SCRIPT, *options, env=environ, cwd=tmp_path)
    assert_completed(job)
    said = [line for line in job.stdout.splitlines() if not line.startswith(("slurmstepd", "srun"))]
    assert said[0] == said[2] == "on n1"
    assert said[1] == "A rank died on n1: the job is queued again, for the 1. of 3 times."
    assert said[3] == "A rank died on n1: the job is queued again, for the 2. of 3 times."
    assert said[4] == "Without n1, where ranks died twice."
    assert said[5] != "on n1"
    assert job.record["ExcNodeList"] == "n1"
    assert list(tmp_path.glob(".smartmoe-job*")) == []


def test_nodes_that_fail_cost_a_spare_one_and_then_a_place_in_the_queue(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = "touch {work}/on.$SLURMD_NODENAME; while [[ ! -e {work}/finish ]]; do sleep 0.2; done"
    environ = home_of(tmp_path, run) | {"SMARTMOE_SPARE_NODES": "1", "SMARTMOE_MAX_REQUEUES": "1"}
    options = sbatch_options(tmp_path, "--nodes", "3", "--exclude", "n4", "--no-kill")
    job_id = slurm.submit(BATCH_SCRIPT, *options, env=environ, cwd=tmp_path)
    job = Watched(slurm, job_id, tmp_path)
    job.wait_until((tmp_path / "on.n2").exists, "the first start")
    assert not (tmp_path / "on.n3").exists()
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.wait_for_line("Node n2 failed: the run is started again on n1,n3, for the 1. of 1 times in this job.")
    job.wait_until((tmp_path / "on.n3").exists, "the second start")
    slurm.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")
    job.wait_for_line("Node n3 failed: the job is queued again, for the 1. of 1 times.")
    (tmp_path / "finish").touch()
    ended = slurm.wait(job_id)
    assert_completed(ended)
    assert ended.record["Restarts"] == "1"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "error: SMARTMOE_SPARE_NODES = 2: must be 0 or more, and less than the job's 2 nodes. "),
        (["--srun-args", "--label"], "error: --srun-args: SMARTMOE_SPARE_NODES chooses nodes by options of srun. "),
    ],
)
def test_spare_nodes_that_make_no_sense_are_refused(
    flags: list[str], says: str, slurm: SlurmCluster, tmp_path: Path
) -> None:
    environ = home_of(tmp_path, "true") | {"SMARTMOE_SPARE_NODES": "1" if flags else "2"}
    options = sbatch_options(tmp_path, "--nodes", "2")
    job = slurm.sbatch(BATCH_SCRIPT, *options, *flags, env=environ, cwd=tmp_path)
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert job.stdout.startswith(says)


def test_a_task_of_an_array_is_stopped_and_queued_again_alone(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Also the one whose job number is the array's: for Slurm's programs that number means all tasks."""
    run = """trap 'echo stopped >>{work}/stopped.$SLURM_ARRAY_TASK_ID; touch "$SMARTMOE_TO_BE_CONTINUED"; exit 0' USR2
touch {work}/started.$SLURM_ARRAY_TASK_ID
while [[ ! -e {work}/finish ]]; do sleep 0.2; done
"""
    environ = home_of(tmp_path, run)
    options = ["--nodes", "1", "--array", "1-2", "--output", str(tmp_path / "job-%a.log"), "--"]
    array = slurm.submit(BATCH_SCRIPT, *options, env=environ, cwd=tmp_path)
    Watched(slurm, f"{array}_1", tmp_path).wait_until(lambda: len(list(tmp_path.glob("started.*"))) == 2, "two tasks")
    tasks = {slurm.job_record(f"{array}_{task}")["JobId"]: f"{array}_{task}" for task in (1, 2)}
    same = tasks.pop(str(array))
    (other,) = tasks.values()
    slurm.run("scancel", "--batch", "--signal=USR1", same)
    Watched(slurm, same, tmp_path).wait_for_line("Time limit: the run was saved, and the job is queued again.")
    (tmp_path / "finish").touch()
    jobs = {task: slurm.wait(task) for task in (same, other)}
    assert {task: (job.state, job.record["Restarts"]) for task, job in jobs.items()} == {
        same: ("COMPLETED", "1"),
        other: ("COMPLETED", "0"),
    }
    assert [path.name for path in tmp_path.glob("stopped.*")] == [f"stopped.{same.partition('_')[2]}"]
    assert "queued again" not in jobs[other].stdout
