"""Tiny runs as jobs: their flags, how they are submitted, and what is waited for."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

from .cluster import Job, SlurmCluster

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts" / "pretrain_gpt_moe.sh"
BATCH_SCRIPT = ROOT / "scripts" / "pretrain_gpt_moe.slurm"
ASK_EVERY_S = 2.0
TIMEOUT_S = 400.0  # a run takes 15 to 30 s alone on two cores, and minutes where others use them

DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
EP2_PP2 = (  # two chunks of layers a rank, which --parallel auto would choose too
    "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
).split()
EP2 = "--expert-model-parallel-size 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
SAVING = ["--save", "{run_dir}/checkpoints", "--load", "{run_dir}/checkpoints", "--save-interval", "4"]
ITERATIONS = 6
LONG_ITERATIONS = 32  # enough to be stopped in the middle several times


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


class Watched:
    """A job that trains, seen from outside."""

    def __init__(self, slurm: SlurmCluster, job_id: int | str, run_dir: Path) -> None:
        self.slurm, self.job_id, self.run_dir = slurm, job_id, run_dir

    def wait_for_steps(self, steps: int) -> None:
        """Wait until the start that is going on, or the next one, has trained for some more iterations."""
        path = self.run_dir / "metrics.jsonl"
        before = path.read_text().count("\n") if path.exists() else 0
        self.wait_until(lambda: path.exists() and path.read_text().count("\n") >= before + steps, f"{steps} steps")

    def wait_for_line(self, text: str) -> None:
        """Wait until the job's output has a text."""
        self.wait_until(lambda: text in self.output, repr(text))

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait while the job has not ended."""
        deadline, asked = time.monotonic() + TIMEOUT_S, 0.0
        while not holds():
            if time.monotonic() > asked + ASK_EVERY_S:  # each time starts a program
                state, asked = self.slurm.job_record(self.job_id)["JobState"], time.monotonic()
                is_alive = state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")
                assert is_alive, f"{state} before {what}: {self.output[-6000:]}"
            assert time.monotonic() < deadline, f"{what} not within {TIMEOUT_S:g} s: {self.output[-6000:]}"
            time.sleep(0.2)

    @functools.cached_property
    def _log(self) -> Path:
        return Path(self.slurm.job_record(self.job_id)["StdOut"])

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def process_of_rank(self, rank: int) -> tuple[int, str]:
        """The process of a rank, neither torchrun nor a launcher, and its node."""
        for pid, command in self.slurm.processes():
            if "adapter.pretrain" in command and "adapter.launch" not in command:
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                environ = dict(variable.split("=", 1) for variable in variables if "=" in variable)
                if environ.get("RANK") == str(rank):
                    return pid, environ["SLURMD_NODENAME"]
        raise AssertionError(f"no process of rank {rank}")
