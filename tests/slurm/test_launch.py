"""A tiny GPT-MoE trained through Slurm, in every way that the scripts offer; the losses are those of one host.

All runs share one seed, so those of one parallelism start from the same weights and see the same tokens: where a run
differs, the launch put a rank in the wrong place. A start of a job costs 40 s of CPU time, nearly all for imports, so
each start is used for as much as it can show.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.training import metrics

from .cluster import SlurmCluster
from .jobs import (
    BATCH_SCRIPT,
    EP2,
    EP2_PP2,
    LAUNCHER,
    LONG_ITERATIONS,
    ROOT,
    SAVING,
    TIMEOUT_S,
    Watched,
    assert_completed,
    assert_same_run,
    from_anywhere,
    own_port,
    sbatch_options,
    tiny,
)

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def test_srun_trains_with_a_task_per_rank(slurm: SlurmCluster, tmp_path: Path, expected: list[float]) -> None:
    run_dir = tmp_path / "run"
    where = ["--nodes", "2", "--ntasks-per-node", "2"]
    done = slurm.run(
        "srun", *where, LAUNCHER, "--run-dir", run_dir, *tiny(*EP2_PP2), env=own_port(), cwd=ROOT, timeout=TIMEOUT_S
    )
    assert_same_run(run_dir, done.stdout, expected)
    assert "adapter.launch.torchrun" not in (run_dir / "command.sh").read_text()


# Stands for pyxis, of which the tests' Slurm has nothing: srun's container options start the command in a "container".
CONTAINER_SRUN = """#!/bin/bash
options=() image=
while [[ ${{1:-}} == -* ]]; do
  case $1 in
    --container-image=*) image=${{1#*=}}; shift ;;
    --nodes|--ntasks|--ntasks-per-node) options+=("$1" "$2"); shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done
if [[ -n $image ]]; then set -- env "IN_CONTAINER=$image" "$@"; fi
printf '%s\\n' "${{options[*]}} in ${{image:-no container}}" >>{log}
exec {srun} "${{options[@]}}" "$@"
"""


def in_container(slurm: SlurmCluster, tmp_path: Path) -> dict[str, str]:
    """Environment of a submission whose tasks run in a container; what srun was asked is noted in srun.log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    real = slurm.run("which", "srun").stdout.strip()
    (programs / "srun").write_text(CONTAINER_SRUN.format(srun=real, log=tmp_path / "srun.log"))
    (programs / "srun").chmod(0o755)
    return {
        "PATH": f"{programs}:{slurm.env['PATH']}",
        "SMARTMOE_SRUN_ARGS": "--container-image=a.sqsh --comment='two words'",
    }


@pytest.mark.parametrize("where", ["on the host", "in a container"])
def test_wrong_flags_end_the_job_with_one_line(where: str, slurm: SlurmCluster, tmp_path: Path) -> None:
    options = sbatch_options(tmp_path, "--nodes", "2")
    flags = ["--nproc", "2", "--run-dir", str(tmp_path / "run"), *tiny(*EP2_PP2, "--num-experts", "7")]
    environ = from_anywhere() | (in_container(slurm, tmp_path) if where == "in a container" else {})
    job = slurm.sbatch(BATCH_SCRIPT, *options, *flags, env=environ, cwd=tmp_path, timeout=TIMEOUT_S)
    # srun's status is the largest of its tasks', and it ends the others when one has refused
    statuses = (2, 137, 143) if where == "in a container" else (2,)
    assert job.state == "FAILED", job.stdout
    assert job.exit_code in statuses, job.stdout
    errors = [line for line in job.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.stdout
    assert "--num-experts" in errors[0]
    assert not (tmp_path / "run").exists()
    if where == "in a container":
        nodes = "--nodes 2 --ntasks 2 --ntasks-per-node 1 --cpu-bind=none --kill-on-bad-exit=1"
        assert (tmp_path / "srun.log").read_text() == f"{nodes} --comment=two words in a.sqsh\n"


def test_nodes_of_one_switch_are_neighbours(slurm: SlurmCluster) -> None:
    """Four nodes, of which n1 and n3 are at one switch: every task computes the same order."""
    code = "import os; from megatron_smartmoe.adapter.launch.topology import find_topology as find; t = find(1); "
    code += "print(t.node, os.environ['SLURMD_NODENAME'], t.order)"
    done = slurm.run("srun", "--nodes", "4", "--ntasks-per-node", "1", sys.executable, "-c", code, cwd=ROOT)
    line = "ranks are given to nodes switch by switch (leaf1: n1 n3, leaf2: n2 n4)"
    assert sorted(done.stdout.splitlines()) == [f"{place} n{node} {line}" for place, node in enumerate((1, 3, 2, 4))]


def submit_long(slurm: SlurmCluster, tmp_path: Path, nodes: int, **environ: str) -> Watched:
    """A job of two ranks on two nodes that saves, may be queued again once after a rank has died, and is preempted."""
    run_dir = tmp_path / "run"
    flags = ["--nproc", "1", "--run-dir", str(run_dir), *tiny(*EP2, *SAVING, iterations=LONG_ITERATIONS)]
    options = sbatch_options(tmp_path, "--nodes", str(nodes), "--no-kill", "--partition", "preemptible")
    environ = from_anywhere() | {"SMARTMOE_MAX_REQUEUES": "1"} | environ
    return Watched(slurm, slurm.submit(BATCH_SCRIPT, *options, *flags, env=environ, cwd=tmp_path), run_dir)


def kill_a_rank(job: Watched) -> None:
    """The job is queued again, and the launchers' last line is neither srun's nor torchrun's."""
    victim, node = job.process_of_rank(1)
    os.kill(victim, signal.SIGKILL)
    queued = f"A rank died on {node}: the job is queued again, for the 1. of 1 times."
    job.wait_for_line(queued)
    last = job.output.partition(queued)[0].splitlines()[-1]
    assert last.startswith(f"smartmoe: rank 1 on {os.uname().nodename} was killed by SIGKILL | it was in iteration ")
    assert " | saved: iteration " in last
    assert "(first observed failure)" not in job.output
    assert all((job.run_dir / log).read_text().splitlines()[-1] == last for log in ("train.log", "node1.log"))


def preempt(job: Watched, tmp_path: Path) -> None:
    """Another job takes the nodes. Slurm sends SIGTERM to the job's steps, and waits for GraceTime."""
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    assert_completed(job.slurm.sbatch(urgent, "--partition", "urgent", "--nodes", "4", "--exclusive", cwd=tmp_path))
    assert job.output.count("Preempted: the run was saved, and the job is queued again.") == 1


def assert_losses(job: Watched, expected: list[float]) -> None:
    """Every loss is, bit for bit, that of a run in peace."""
    lines = metrics(job.run_dir)
    for line in lines:
        assert line["lm loss"] == expected[line["iteration"] - 1], line
    assert lines[-1]["iteration"] > 4


def test_a_job_goes_on_after_a_crash_and_a_preemption(
    slurm: SlurmCluster, tmp_path: Path, expected_long: list[float]
) -> None:
    """What a batch script does when nodes fail and its time is up, tests/slurm/test_batch_script.py shows."""
    job = submit_long(slurm, tmp_path, nodes=2, NCCL_IB_SL="1")
    job.wait_for_steps(5)
    assert "num-experts: '8'" in (job.run_dir / "config.yaml").read_text()
    assert "--nnodes 2" in (job.run_dir / "command.sh").read_text()
    noted = json.loads((job.run_dir / "environment.json").read_text())
    assert (noted["slurm"]["SLURM_JOB_ID"], noted["settings"]["NCCL_IB_SL"]) == (str(job.job_id), "1")
    kill_a_rank(job)
    job.wait_for_steps(2)
    preempt(job, tmp_path)
    slurm.run("scancel", str(job.job_id))
    assert_losses(job, expected_long)
    saved = (job.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert int(saved) == metrics(job.run_dir)[-1]["iteration"]  # the stop lost nothing


@pytest.mark.long
def test_a_job_goes_on_after_everything_that_happens_to_it(
    slurm: SlurmCluster, tmp_path: Path, expected_long: list[float]
) -> None:
    """A node fails, a rank is killed, Slurm preempts the job, its time is up: every loss is that of a run in peace."""
    # Step 1: a node fails. The spare one takes its place, in the same allocation.
    job = submit_long(slurm, tmp_path, nodes=3, SMARTMOE_SPARE_NODES="1")
    job.wait_for_steps(5)
    _, failed = job.process_of_rank(1)
    slurm.run("scontrol", "update", f"NodeName={failed}", "State=DOWN", "Reason=test")
    job.wait_for_line(f"Node {failed} failed: the run is started again on ")
    assert slurm.job_record(job.job_id)["Restarts"] == "0"

    # Step 2: a rank is killed, and no spare node is left.
    job.wait_for_steps(2)
    kill_a_rank(job)

    # Step 3: another job takes the nodes.
    job.wait_for_steps(2)
    preempt(job, tmp_path)

    # Step 4: USR1 to the batch script is what Slurm sends before the time limit (--signal=B:USR1@300).
    job.wait_for_steps(2)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.job_id))
    job.wait_for_line("Time limit: the run was saved, and the job is queued again.")
    job.wait_until(lambda: slurm.job_record(job.job_id)["Restarts"] == "3", "the third restart")
    slurm.run("scancel", str(job.job_id))
    assert_losses(job, expected_long)
    iterations = [line["iteration"] for line in metrics(job.run_dir)]
    assert (
        sum(second <= first for first, second in itertools.pairwise(iterations)) <= 2
    )  # stops that saved lost nothing
