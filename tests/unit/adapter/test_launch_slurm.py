"""What the launcher asks of Slurm's programs: srun on an allocation, sbatch on a login node."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_smartmoe.adapter.launch import launcher, slurm
from megatron_smartmoe.adapter.launch.deaths import Death
from megatron_smartmoe.adapter.launch.ending import Ending, SharedDeaths, attempt_of
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError

PYTHON_M = [sys.executable, "-m"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        ran.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_a_batch_script_starts_a_launcher_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def run(*args: Any, limit_s: float) -> int:
        ran.append(args)
        return 7

    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(slurm.process, "run", run)
    assert slurm.srun(Topology(num_nodes=2, needs_srun=True), ["--config", "a b.yaml"]) == 7
    command, environment, log, _ = ran[0]
    launch = [*PYTHON_M, "megatron_smartmoe.adapter.launch", "--config", "a b.yaml"]
    assert [command[0], Path(command[1]).name, *command[2:]] == ["bash", "srun_per_node.sh", "2", *launch]
    assert (environment, log) == ({}, None)


def test_what_the_launchers_say_last_is_said_again_after_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun itself has a line for every task that failed."""
    shared = SharedDeaths(directory=tmp_path, name="srun", attempt="7.1")

    def run(command: list[str], environment: dict[str, str], *_: Any, **__: Any) -> int:
        assert attempt_of(environment) == "7.1"
        there = replace(shared, name="node1", attempt=attempt_of(environment))
        there.write([Death(rank=3, host="n2", status=-9, time_s=1.0)])
        print("srun: error: n2: task 1: Exited with exit code 137")
        return 137

    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(slurm.process, "run", run)
    ending = Ending(shared=shared, resume="launch --run-dir D")
    assert slurm.srun(Topology(num_nodes=2, needs_srun=True), [], ending=ending) == 137
    assert capsys.readouterr().out.splitlines()[-1].startswith("smartmoe: rank 3 on n2 was killed by SIGKILL | ")


def test_one_task_on_each_node(tmp_path: Path) -> None:
    """The fixed options of srun, which the launcher and the batch script share."""
    program = tmp_path / "srun"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", str(slurm._PER_NODE), "3", "--comment=two words", "launch", "a b"]
    words = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()
    nodes = ["--nodes", "3", "--ntasks", "3", "--ntasks-per-node", "1"]
    assert words == [*nodes, "--cpu-bind=none", "--kill-on-bad-exit=1", "--comment=two words", "launch", "a b"]


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "7"}, "7"),
        # The last task of an array has the array's number, which scancel takes for the whole array.
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
    ],
)
def test_sigterm_goes_to_the_tasks_through_slurm(
    variables: dict[str, str], job: str, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(slurm.process, "run", lambda command, environment, log, terminate, **_: terminate(None))
    slurm.srun(Topology(num_nodes=2, needs_srun=True), [])
    assert commands == [["scancel", "--signal=TERM", job]]


def test_a_missing_srun_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        slurm.srun(Topology(num_nodes=2, needs_srun=True), [])
    assert str(caught.value) == "SLURM_JOB_NUM_NODES = 2: srun is not on PATH. Add Slurm's programs to PATH."


def test_options_of_the_user_go_to_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.step_options(None, {}) == []
    assert slurm.step_options(None, {"SMARTMOE_SRUN_ARGS": "--mpi=pmix --label"}) == ["--mpi=pmix", "--label"]
    asked = slurm.step_options("--comment='two words' --no-kill", JOB | {"SMARTMOE_SRUN_ARGS": "--label"})
    assert asked == ["--comment=two words", "--no-kill"]


@pytest.mark.parametrize(
    ("asked", "environ", "text"),
    [
        ("--label", {}, "--srun-args = '--label': there is no allocation of Slurm here, and so no srun. "),
        ("--nodes=3", JOB, "--srun-args = '--nodes=3': --nodes is set by the launcher: one launcher per node"),
        ("--label -n 4", JOB, "--srun-args = '--label -n 4': -n is set by the launcher"),
        ("-N2", JOB, "--srun-args = '-N2': -N2 is set by the launcher"),
        ("--comment='x", JOB, '--srun-args = "--comment=\'x": is no list of words: No closing quotation. '),
        (None, {"SMARTMOE_SRUN_ARGS": "--pty"}, "SMARTMOE_SRUN_ARGS = '--pty': --pty is set by the launcher"),
    ],
)
def test_options_that_say_where_ranks_run_are_refused(asked: str | None, environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm.step_options(asked, environ)
    assert str(caught.value).startswith(text)


def test_a_container_is_checked_from_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Python of its own: nothing is checked on this host, wrong flags neither."""
    ran: list[Any] = []
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")

    def run(command: list[str], *_: Any, **__: Any) -> int:
        ran.append(command)
        return 0

    monkeypatch.setattr(slurm.process, "run", run)
    argv = ["--srun-args", "--container-image=a.sqsh --container-mounts=/d", "--num-layers", "-3"]
    assert launcher.main(argv) == 0
    command = ran[0]
    assert Path(command[1]).name == "srun_per_node.sh"
    assert command[2:4] == ["2", "--container-image=a.sqsh"]
    script = Path(command[command.index("--container-mounts=/d") + 1])
    assert script.name == "pretrain_gpt_moe.sh"
    assert script.is_file()
    assert command[-len(argv) :] == argv


def test_a_run_is_submitted_from_a_login_node(
    monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    argv = ["--slurm", "--nodes 4 --time 1:00:00", "--config", "quickstart", "--nproc", "8"]
    assert launcher.main([*argv, "--dry-run"]) == 0
    assert not commands
    printed = capsys.readouterr().out
    assert launcher.main(argv) == 0
    assert [subprocess.list2cmdline(command) for command in commands] == [printed.strip()]
    assert commands[0][:5] == ["sbatch", "--nodes", "4", "--time", "1:00:00"]
    assert Path(commands[0][5]).name == "pretrain_gpt_moe.slurm"
    assert commands[0][6:] == ["--config", "quickstart", "--nproc", "8"]


def test_a_job_submits_no_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launcher.main(["--slurm", "--nodes 1"]) == 2
    assert "error: --slurm = '--nodes 1': this is a process of Slurm job 7 already. " in capsys.readouterr().err
