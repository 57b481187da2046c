"""Slurm's programs: srun starts a launcher on each node of an allocation, sbatch queues a run from a login node."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_smartmoe.adapter.launch import process
from megatron_smartmoe.adapter.launch.ending import ATTEMPT_VARIABLE, Ending
from megatron_smartmoe.adapter.launch.topology import Topology, port_of_steps
from megatron_smartmoe.errors import ConfigError

ARGS_VARIABLE = "SMARTMOE_SRUN_ARGS"
_ROOT = Path(__file__).parents[3]
_PER_NODE = Path(__file__).with_name("srun_per_node.sh")
_SRUN_LIMIT_S = 60.0  # from SIGTERM to the end of srun: more than the launchers on its nodes need
_OURS = re.compile(r"--(nodes|ntasks|ntasks-per-node|ntasks-per-gpu|het-group|multi-prog|pty|overcommit)(=|$)|-[NnO]")


def step_options(asked: str | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The options that the user adds to srun: the launcher's flag, else the variable.

    Raises:
        ConfigError: they are no words of a shell, or say where ranks run; or the flag is given outside an allocation,
            where it would do nothing. The variable may be set for a whole site.
    """
    name, text = ("--srun-args", asked) if asked is not None else (ARGS_VARIABLE, environ.get(ARGS_VARIABLE, ""))
    if asked is not None and "SLURM_JOB_ID" not in environ:
        rule = "there is no allocation of Slurm here, and so no srun"
        raise ConfigError(name, asked, rule, "Remove it, or run the line inside salloc or sbatch.")
    words = _words(name, text)
    for word in words:
        if _OURS.match(word):
            rule = f"{word.partition('=')[0]} is set by the launcher: one launcher per node of the allocation"
            raise ConfigError(name, text, rule, "Remove it there, and choose nodes with sbatch or salloc.")
    return words


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(name, text, f"is no list of words: {error}", "Close the quotes, as for a shell.") from None


def is_in_container(options: Sequence[str]) -> bool:
    """Whether the ranks run in a container that srun starts (pyxis): this host's Python is not theirs then."""
    return any(option.partition("=")[0] == "--container-image" for option in options)


def srun(
    topology: Topology,
    argv: Sequence[str],
    options: Sequence[str] = (),
    module: str = __package__,
    ending: Ending | None = None,
) -> int:
    """Start one launcher, or another module, per node of the allocation; returns the exit status of the job.

    Args:
        topology: of the allocation.
        argv: the command line of each launcher.
        options: of the user, for srun; see `step_options`.
        module: what to start.
        ending: to repeat the last line of the launchers, which is not the last any more when srun has had its say.

    Raises:
        ConfigError: there is no srun.
    """
    if shutil.which("srun") is None:
        raise ConfigError(
            "SLURM_JOB_NUM_NODES", topology.num_nodes, "srun is not on PATH", "Add Slurm's programs to PATH."
        )
    python = [sys.executable, "-m", module]
    if is_in_container(options) and module == __package__:  # with the Python that the script finds there
        python = [str(_ROOT / "scripts" / "pretrain_gpt_moe.sh")]
    command = ["bash", str(_PER_NODE), str(topology.num_nodes), *options, *python, *argv]

    def terminate(child: object) -> None:  # srun itself would kill its tasks at once; scancel sends them SIGTERM
        subprocess.run(["scancel", "--signal=TERM", _job_name(os.environ)], check=False)

    port = port_of_steps()
    environment = {} if port is None else {"MASTER_PORT": str(port)}
    if ending is not None and ending.shared is not None:
        environment[ATTEMPT_VARIABLE] = ending.shared.attempt
    status = process.run(command, environment, None, terminate, limit_s=_SRUN_LIMIT_S)
    if ending is not None and ending.others_died() and (line := ending.line(status, [], None)):
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"smartmoe: {line}", flush=True)
        if ending.cause is not None:  # srun's own status may be that of a task which it has ended
            return ending.cause.exit_status
    return status


def _job_name(environ: Mapping[str, str]) -> str:
    """The job as Slurm's programs take it. One task of an array has the array's own number, which means all of them."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def submit(options: str, argv: Sequence[str], *, dry_run: bool) -> int:
    """Queue a run as a batch job; returns sbatch's exit status. What is wrong with the run shows when the job starts.

    Args:
        options: of sbatch, in one word.
        argv: the launcher's command line, with `--slurm` and its value.
        dry_run: print the command instead.

    Raises:
        ConfigError: there is no sbatch, this is a job already, or the options are no words of a shell.
    """
    words = _words("--slurm", options)
    if "SLURM_JOB_ID" in os.environ:
        rule = f"this is a process of Slurm job {os.environ['SLURM_JOB_ID']} already"
        raise ConfigError("--slurm", options, rule, "Remove it to run in this allocation.")
    script = _ROOT / "scripts" / "pretrain_gpt_moe.slurm"
    command = ["sbatch", *words, str(script), *_without_submission(argv)]
    if dry_run:
        print(shlex.join(command))
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm", options, "sbatch is not on PATH", "Use a login node, or add Slurm's programs.")
    return subprocess.run(command, check=False, env={**os.environ, "SMARTMOE_HOME": str(_ROOT)}).returncode


def _without_submission(argv: Sequence[str]) -> list[str]:
    """The command line of the job itself."""
    rest, words = [], iter(argv)
    for word in words:
        if word == "--slurm":
            next(words, None)
        elif word != "--dry-run" and not word.startswith("--slurm="):
            rest.append(word)
    return rest
