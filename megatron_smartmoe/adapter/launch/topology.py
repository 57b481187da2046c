"""Where the ranks of this job run: on this host alone, or on the nodes of a Slurm allocation.

Three situations inside Slurm, distinguished by Slurm's variables:

- the batch script of `sbatch`, or the shell of `salloc` (no step): start one launcher per node through srun. With one
  node too: salloc's shell may be on a login node, and Slurm sends signals to steps;
- a task of `srun --ntasks-per-node=1`: this launcher starts the node's ranks through torchrun;
- a task of `srun` with a task per rank: this process becomes that rank.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_smartmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The ranks of one job, as seen from this process.

    Attributes:
        num_nodes: nodes of the job.
        node: this node's number.
        ranks_per_node: ranks on each node.
        master_addr: address of node 0; only read when num_nodes > 1 or `rank` is set.
        master_port: port there.
        rank: the rank that this process is, when Slurm starts one task per rank; else None.
        needs_srun: this is an allocation but no step: launchers have to be started on them first.
    """

    num_nodes: int = 1
    node: int = 0
    ranks_per_node: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    rank: int | None = None
    needs_srun: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.num_nodes * self.ranks_per_node

    @property
    def is_reporter(self) -> bool:
        """Whether this process prints, and writes the run directory, for the whole job."""
        return self.node == 0 and not self.rank


def reports_errors(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reports errors: of a Slurm step only task 0 does."""
    return "SLURM_STEP_NUM_TASKS" not in environ or environ.get("SLURM_PROCID", "0") == "0"


def find_topology(ranks_per_node: int, environ: Mapping[str, str] = os.environ) -> Topology:
    """The topology of the job that this process belongs to.

    Args:
        ranks_per_node: of the user or the machine; a Slurm step with a task per rank overrides it.
        environ: the environment with Slurm's variables.

    Raises:
        ConfigError: the Slurm step has unequal numbers of tasks on its nodes.
    """
    if "SLURM_JOB_ID" not in environ:
        return Topology(ranks_per_node=ranks_per_node)
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, as if it were task 0 of the job; STEP variables it has not.
    if "SLURM_STEP_NUM_TASKS" not in environ:
        num_nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
        return Topology(num_nodes=num_nodes, ranks_per_node=ranks_per_node, needs_srun=True)
    num_nodes = int(environ["SLURM_STEP_NUM_NODES"])
    tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"], num_nodes)
    rank = int(environ["SLURM_PROCID"]) if tasks > 1 else None
    return Topology(
        num_nodes=num_nodes,
        node=int(environ["SLURM_NODEID"]),
        ranks_per_node=tasks if tasks > 1 else ranks_per_node,
        master_addr=_address(environ, environ["SLURM_STEP_NODELIST"]) if num_nodes > 1 else "127.0.0.1",
        master_port=_port(environ),
        rank=rank,
    )


def _tasks_per_node(text: str, num_nodes: int) -> int:
    """Slurm writes `2(x3)` for three nodes of two tasks, and `2,1` for unequal ones."""
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text)
    if match is None or int(match[2] or 1) != num_nodes:
        raise ConfigError(
            "SLURM_STEP_TASKS_PER_NODE",
            text,
            "must be the same number of tasks on every node",
            "Use srun --ntasks-per-node=1.",
        )
    return int(match[1])


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT, else a port that depends on the job and the step only, so that every node has the same."""
    asked = environ.get("MASTER_PORT")
    if asked and not (asked.isdecimal() and 1 <= int(asked) <= 65535):
        rule = "must be a port number, 1 to 65535"
        raise ConfigError(
            "MASTER_PORT", asked, rule, "Unset it for a port per job, or set a free one, for example 29500."
        )
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    return int(asked) if asked else 20000 + (job * 7 + step) % 20000


def _address(environ: Mapping[str, str], nodelist: str) -> str:
    """The address of the first node: MASTER_ADDR, else Slurm's NodeAddr, else the node's name."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    first = _scontrol("show", "hostnames", nodelist).split()[0]
    # Where node names are not host names (tests, clouds), Slurm's NodeAddr is the one that works.
    match = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first, "--oneliner"))
    return match[1] if match else first


def _scontrol(*arguments: str) -> str:
    if shutil.which("scontrol") is None:
        rule = "is not set, and scontrol, which lists the nodes' addresses, is not on PATH"
        raise ConfigError(
            "MASTER_ADDR", None, rule, "Add Slurm's programs to PATH, or set MASTER_ADDR to the first node."
        )
    done = subprocess.run(["scontrol", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        rule = f"`scontrol {' '.join(arguments)}` failed: {done.stderr.strip() or done.returncode}"
        raise ConfigError("MASTER_ADDR", None, rule, "Set MASTER_ADDR to the first node's address.")
    return done.stdout
