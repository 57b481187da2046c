"""A tiny GPT-MoE trained through Slurm, in every way that the scripts offer; the losses are those of one host.

All runs share one parallelism and one seed, so they start from the same weights and see the same tokens: where a run
differs, the launch put a rank in the wrong place.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses, metrics, train

from .cluster import Job, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts" / "pretrain_gpt_moe.sh"
BATCH_SCRIPT = ROOT / "scripts" / "pretrain_gpt_moe.slurm"
TIMEOUT_S = 240.0  # a run takes 15 to 30 s alone on two cores

DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
EP2_PP2 = "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
EP2 = "--expert-model-parallel-size 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
SAVING = ["--save", "{run_dir}/checkpoints", "--load", "{run_dir}/checkpoints", "--save-interval", "1000"]
ITERATIONS = 6
LONG_ITERATIONS = 24  # enough to be stopped in the middle


def tiny(*flags: str, iterations: int = ITERATIONS) -> list[str]:
    """Megatron's flags of a tiny run."""
    return [*TINY_MODEL, *TINY_TRAINING, *DATA, "--train-iters", str(iterations), *flags]


def own_port() -> dict[str, str]:
    """A free port for the ranks to meet: all "nodes" are this host, on which others may run the same job number."""
    return {"MASTER_PORT": str(free_ports(1)[0])}


def from_anywhere() -> dict[str, str]:
    """Environment of a submission from outside the checkout."""
    return own_port() | {"SMARTMOE_HOME": str(ROOT)}


def sbatch_options(tmp_path: Path, *options: str) -> list[str]:
    return [*options, "--output", str(tmp_path / "job.log"), "--"]


def assert_completed(job: Job) -> None:
    assert (job.state, job.exit_code, job.exit_signal) == ("COMPLETED", 0, 0), job.stdout[-6000:]


def assert_same_run(run_dir: Path, output: str, expected: list[float]) -> None:
    """The log reports one end, and the losses are those of one host."""
    assert output.count(f"Finished after {ITERATIONS} iterations.") == 1, output[-6000:]
    assert losses(run_dir) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of four ranks, EP 2 x PP 2, without Slurm."""
    return train(tmp_path_factory.mktemp("here"), 4, DATA, *EP2_PP2, iterations=ITERATIONS)


@pytest.fixture(scope="module")
def expected_long(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two ranks, EP 2, without Slurm and without a stop."""
    return train(tmp_path_factory.mktemp("here"), 2, DATA, *EP2, iterations=LONG_ITERATIONS)


def test_sbatch_trains_on_two_nodes_with_torchrun(slurm: SlurmCluster, tmp_path: Path, expected: list[float]) -> None:
    run_dir = tmp_path / "run"
    options = sbatch_options(tmp_path, "--nodes", "2")
    flags = ["--nproc", "2", "--run-dir", str(run_dir), *tiny(*EP2_PP2)]
    job = slurm.sbatch(BATCH_SCRIPT, *options, *flags, cwd=ROOT, timeout=TIMEOUT_S)
    assert_completed(job)
    assert_same_run(run_dir, job.stdout, expected)
    assert job.stdout.count("smartmoe: 4 ranks on 2 nodes") == 1

    assert "num-experts: '8'" in (run_dir / "config.yaml").read_text()
    assert "--nnodes 2" in (run_dir / "command.sh").read_text()
    variables = json.loads((run_dir / "environment.json").read_text())["slurm"]
    assert (variables["SLURM_JOB_ID"], variables["SLURM_JOB_NUM_NODES"]) == (str(job.job_id), "2")
    assert "Finished after" in (run_dir / "train.log").read_text()
    assert (run_dir / "node1.log").is_file()
    assert json.loads((run_dir / "summary.json").read_text())["iterations"] == ITERATIONS


def test_srun_trains_with_a_task_per_rank(slurm: SlurmCluster, tmp_path: Path, expected: list[float]) -> None:
    run_dir = tmp_path / "run"
    where = ["--nodes", "2", "--ntasks-per-node", "2"]
    done = slurm.run(
        "srun", *where, LAUNCHER, "--run-dir", run_dir, *tiny(*EP2_PP2), env=own_port(), cwd=ROOT, timeout=TIMEOUT_S
    )
    assert_same_run(run_dir, done.stdout, expected)
    assert "adapter.launch.torchrun" not in (run_dir / "command.sh").read_text()


def test_the_launcher_in_a_batch_script_starts_itself_on_all_nodes(
    slurm: SlurmCluster, tmp_path: Path, expected: list[float]
) -> None:
    run_dir = tmp_path / "run"
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexec {LAUNCHER} "$@"\n')
    options = sbatch_options(tmp_path, "--nodes", "2", "--ntasks-per-node", "1")
    flags = ["--nproc", "2", "--run-dir", str(run_dir), *tiny(*EP2_PP2)]
    job = slurm.sbatch(script, *options, *flags, env=own_port(), cwd=ROOT, timeout=TIMEOUT_S)
    assert_completed(job)
    assert_same_run(run_dir, job.stdout, expected)
    assert (run_dir / "node1.log").is_file()


def wait_for_iteration(slurm: SlurmCluster, job_id: int, run_dir: Path, iteration: int) -> None:
    """Wait until a job has trained for that many iterations."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert slurm.job_record(job_id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), "ended too early"
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= iteration:
            return
        time.sleep(0.2)
    raise AssertionError(f"iteration {iteration} not reached within {TIMEOUT_S:g} s")


def test_a_job_whose_time_is_up_saves_is_queued_again_and_resumes_exactly(
    slurm: SlurmCluster, tmp_path: Path, expected_long: list[float]
) -> None:
    """USR1 to the batch script is what Slurm sends before the time limit (--signal=B:USR1@300)."""
    run_dir = tmp_path / "run"
    flags = ["--nproc", "1", "--run-dir", str(run_dir), *tiny(*EP2, *SAVING, iterations=LONG_ITERATIONS)]
    options = sbatch_options(tmp_path, "--nodes", "2")
    job_id = slurm.submit(BATCH_SCRIPT, *options, *flags, env=from_anywhere(), cwd=tmp_path)
    wait_for_iteration(slurm, job_id, run_dir, 3)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job_id))
    job = slurm.wait(job_id, timeout=TIMEOUT_S)
    assert_completed(job)
    assert job.record["Restarts"] == "1", job.stdout[-6000:]
    assert job.stdout.count("Time limit: the run was saved, and the job is queued again.") == 1
    assert job.stdout.count("Finished after") == 1

    lines = metrics(run_dir)
    assert [line["iteration"] for line in lines] == list(range(1, LONG_ITERATIONS + 1))  # nothing lost, nothing twice
    assert losses(run_dir) == expected_long  # bit for bit


def test_a_rank_that_dies_on_one_node_ends_the_job_with_its_name(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Both launchers end; the last line of the job's output is neither srun's nor torchrun's."""
    run_dir = tmp_path / "run"
    flags = ["--nproc", "1", "--run-dir", str(run_dir), *tiny(*EP2, iterations=1000)]
    options = sbatch_options(tmp_path, "--nodes", "2")
    job_id = slurm.submit(BATCH_SCRIPT, *options, *flags, env=from_anywhere(), cwd=tmp_path)
    wait_for_iteration(slurm, job_id, run_dir, 1)
    os.kill(process_of_rank(slurm, 1), signal.SIGKILL)
    job = slurm.wait(job_id, timeout=TIMEOUT_S)
    assert (job.state, job.exit_code) == ("FAILED", 137), job.stdout[-6000:]
    last = f"smartmoe: rank 1 on {os.uname().nodename} was killed by SIGKILL | it was in iteration "
    assert job.stdout.splitlines()[-1].startswith(last), job.stdout[-3000:]
    assert " | no folder of checkpoints (--save) | " in job.stdout.splitlines()[-1]
    assert "(first observed failure)" not in job.stdout
    for log in ("train.log", "node1.log"):
        assert (run_dir / log).read_text().splitlines()[-1].startswith(last)


def test_a_preempted_job_saves_is_queued_again_and_resumes_exactly(
    slurm: SlurmCluster, tmp_path: Path, expected_long: list[float]
) -> None:
    """Slurm sends SIGTERM to the job's steps, waits for the partition's GraceTime, and takes the nodes."""
    run_dir = tmp_path / "run"
    flags = ["--nproc", "1", "--run-dir", str(run_dir), *tiny(*EP2, *SAVING, iterations=LONG_ITERATIONS)]
    options = sbatch_options(tmp_path, "--nodes", "2", "--partition", "preemptible")
    job_id = slurm.submit(BATCH_SCRIPT, *options, *flags, env=from_anywhere(), cwd=tmp_path)
    wait_for_iteration(slurm, job_id, run_dir, 3)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    other = slurm.sbatch(
        urgent, "--partition", "urgent", "--nodes", "4", "--exclusive", cwd=tmp_path, timeout=TIMEOUT_S
    )
    assert_completed(other)
    job = slurm.wait(job_id, timeout=TIMEOUT_S)
    assert_completed(job)
    assert job.stdout.count("Preempted: the run was saved, and the job is queued again.") == 1, job.stdout[-6000:]
    assert [line["iteration"] for line in metrics(run_dir)] == list(range(1, LONG_ITERATIONS + 1))
    assert losses(run_dir) == expected_long  # bit for bit


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
exec {srun} "${{options[@]}}" "$@"
"""


def test_after_a_death_the_job_is_queued_again_in_its_container(
    slurm: SlurmCluster, tmp_path: Path, expected_long: list[float]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    real = slurm.run("which", "srun").stdout.strip()
    (programs / "srun").write_text(CONTAINER_SRUN.format(srun=real))
    (programs / "srun").chmod(0o755)
    run_dir = tmp_path / "run"
    saving = [*SAVING[:-1], "4"]
    flags = ["--nproc", "1", "--run-dir", str(run_dir), *tiny(*EP2, *saving, iterations=LONG_ITERATIONS)]
    environ = from_anywhere() | {
        "PATH": f"{programs}:{slurm.env['PATH']}",
        "SMARTMOE_SRUN_ARGS": "--container-image=a.sqsh --comment='two words'",
        "SMARTMOE_MAX_REQUEUES": "1",
    }
    options = sbatch_options(tmp_path, "--nodes", "2")
    job_id = slurm.submit(BATCH_SCRIPT, *options, *flags, env=environ, cwd=tmp_path)
    wait_for_iteration(slurm, job_id, run_dir, 6)
    victim = process_of_rank(slurm, 1)
    assert b"IN_CONTAINER=a.sqsh" in Path(f"/proc/{victim}/environ").read_bytes().split(b"\0")
    os.kill(victim, signal.SIGKILL)
    job = slurm.wait(job_id, timeout=TIMEOUT_S)
    assert_completed(job)
    assert job.record["Restarts"] == "1", job.stdout[-6000:]
    assert job.stdout.count(": the job is queued again, for the 1. of 1 times.") == 1, job.stdout[-6000:]
    assert losses(run_dir)[-LONG_ITERATIONS + 4 :] == expected_long[4:]  # from the checkpoint on, bit for bit


def process_of_rank(slurm: SlurmCluster, rank: int) -> int:
    """The process of a rank: neither torchrun nor a launcher, whose command lines have the rank's too."""
    found = [pid for pid, command in slurm.processes() if "adapter.pretrain" in command and has_rank(pid, rank)]
    return next(pid for pid in found if "adapter.launch" not in Path(f"/proc/{pid}/cmdline").read_text())


def has_rank(pid: int, rank: int) -> bool:
    """Whether a process has this RANK in its environment."""
    return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_wrong_flags_end_the_job_with_one_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    options = sbatch_options(tmp_path, "--nodes", "2")
    flags = ["--nproc", "2", "--run-dir", str(tmp_path / "run"), *tiny(*EP2_PP2, "--num-experts", "7")]
    job = slurm.sbatch(BATCH_SCRIPT, *options, *flags, env=from_anywhere(), cwd=tmp_path, timeout=TIMEOUT_S)
    assert (job.state, job.exit_code) == ("FAILED", 2), job.stdout
    errors = [line for line in job.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.stdout
    assert "--num-experts" in errors[0]
    assert not (tmp_path / "run").exists()
