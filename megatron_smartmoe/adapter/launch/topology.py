"""Where the ranks of this job run: on this host alone, on the nodes of a Slurm allocation, or on those of another job
(`node_variables`).

Three situations inside Slurm, distinguished by Slurm's variables:

- the batch script of `sbatch`, or the shell of `salloc`: start one launcher per node through srun. With one node too:
  salloc's shell may be on a login node, and Slurm sends signals to steps;
- a task of `srun --ntasks-per-node=1`: this launcher starts the node's ranks through torchrun;
- a task of `srun` with a task per rank: this process is the parent of that rank.

Everything else (a heterogeneous job, one terminal of several tasks, ranks dealt out like cards, variables that are
missing) is refused in one line: ranks that wait for others that never come look like a slow start.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_smartmoe.adapter.launch.node_variables import Nodes, whole_number
from megatron_smartmoe.adapter.launch.switches import NodeOrder, expand_hosts, order_by_switch
from megatron_smartmoe.errors import ConfigError

_INTERACTIVE_STEP = ("4294967290", "interactive")  # SLURM_INTERACTIVE_STEP in slurm.h, 0xfffffffa
_FIRST_PORT, _NUM_PORTS = 20000, 10000
_ORDER_VARIABLE = "SMARTMOE_NODE_ORDER"


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
        source: who says which nodes these are, for a line at the start; empty for this host and for Slurm.
        order: how the nodes are ordered, likewise; empty where it is the order in which they are listed.
    """

    num_nodes: int = 1
    node: int = 0
    ranks_per_node: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    rank: int | None = None
    needs_srun: bool = False
    source: str = ""
    order: str = ""

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
    return not is_step_task(environ) or environ.get("SLURM_PROCID", "0") == "0"


def find_topology(ranks_per_node: int, environ: Mapping[str, str] = os.environ, nodes: Nodes | None = None) -> Topology:
    """The topology of the job that this process belongs to.

    Args:
        ranks_per_node: of the user or the machine; a Slurm step with a task per rank overrides it.
        environ: the environment with Slurm's variables.
        nodes: of a job that is not Slurm's; None for this host.

    Raises:
        ConfigError: the Slurm step has unequal numbers of tasks on its nodes, or ranks that are not consecutive on a
            node; or this is a heterogeneous job, or one task of several in an interactive shell; or a variable of Slurm
            is missing or makes no sense; or the port is taken.
    """
    if "SLURM_JOB_ID" not in environ:
        return Topology(ranks_per_node=ranks_per_node) if nodes is None else _of_nodes(nodes, ranks_per_node)
    job = _number(environ, "SLURM_JOB_ID", 1)
    if not is_step_task(environ):
        _refuse_components(environ)
        name = "SLURM_JOB_NUM_NODES" if "SLURM_JOB_NUM_NODES" in environ else "SLURM_NNODES"
        return Topology(num_nodes=_number(environ, name, 1), ranks_per_node=ranks_per_node, needs_srun=True)
    num_nodes = _number(environ, "SLURM_STEP_NUM_NODES", 1)
    tasks = _tasks_per_node(environ, num_nodes)
    number = _number(environ, "SLURM_NODEID", 0, num_nodes - 1)
    local = _local_rank(environ, number, num_nodes, tasks) if tasks > 1 else None
    order = _node_order(environ, num_nodes)
    rank = None if local is None else order.places[number] * tasks + local
    topology = Topology(
        num_nodes=num_nodes,
        node=order.places[number],
        ranks_per_node=tasks if tasks > 1 else ranks_per_node,
        master_addr=_address(environ) if num_nodes > 1 else "127.0.0.1",
        master_port=_port(environ, job),
        rank=rank,
        order=order.line,
    )
    if topology.is_reporter and (num_nodes > 1 or rank is not None):
        _refuse_taken_port(topology.master_port)
    return topology


def _of_nodes(nodes: Nodes, ranks_per_node: int) -> Topology:
    topology = Topology(
        num_nodes=nodes.num_nodes,
        node=nodes.node,
        ranks_per_node=ranks_per_node,
        master_addr=nodes.master_addr,
        master_port=nodes.master_port,
        source=nodes.source,
    )
    if topology.is_reporter and topology.num_nodes > 1:
        _refuse_taken_port(topology.master_port)
    return topology


def is_step_task(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process belongs to a task of a step, which srun started.

    The shell of `salloc` may run in a step of its own, on the first node (use_interactive_step). It is still the place
    to start srun from, like the shell of a batch script.
    """
    return "SLURM_STEP_NUM_TASKS" in environ and environ.get("SLURM_STEP_ID") not in _INTERACTIVE_STEP


def is_outside_steps(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is in an allocation, and in none of the steps that srun has started there."""
    return "SLURM_JOB_ID" in environ and not is_step_task(environ)


def port_of_steps(environ: Mapping[str, str] = os.environ) -> int | None:
    """A free port for the ranks of the steps that this process starts, which all nodes then have in common.

    None where it cannot be looked for, because this is not the first node, or need not be: MASTER_PORT is set.
    """
    here = environ.get("SLURMD_NODENAME")
    if environ.get("MASTER_PORT") or here is None or here != first_host(environ.get("SLURM_JOB_NODELIST", here)):
        return None
    first = _port(environ, _number(environ, "SLURM_JOB_ID", 1))
    candidates = (_FIRST_PORT + (first - _FIRST_PORT + 61 * turn) % _NUM_PORTS for turn in range(100))
    return next((port for port in candidates if not _is_taken(port)), None)


def _number(environ: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """A variable of Slurm that is a whole number."""
    text = environ.get(name)
    way_out = "Start the launcher with srun, or run `unset SLURM_JOB_ID` first to use this host alone."
    if text is None:
        raise ConfigError(name, None, "is not set, although SLURM_JOB_ID is", way_out)
    return whole_number(name, text, least, most, way_out)


def _refuse_components(environ: Mapping[str, str]) -> None:
    """A job of several components has nodes of several kinds, and one srun starts the ranks on those of one."""
    size = environ.get("SLURM_HET_SIZE", "1")
    if size not in ("", "0", "1"):
        rule = "the job has several components (a heterogeneous job), and ranks need nodes of one kind"
        way_out = "Start the launcher on one of them: srun --het-group=0 --ntasks-per-node=1 ..."
        raise ConfigError("SLURM_HET_SIZE", size, rule, way_out)


def _tasks_per_node(environ: Mapping[str, str], num_nodes: int) -> int:
    """Slurm writes `2(x3)` for three nodes of two tasks, and `2,1` for unequal ones."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", text)
    if match is None or int(match[2] or 1) != num_nodes or int(match[1]) < 1:
        raise ConfigError(
            "SLURM_STEP_TASKS_PER_NODE",
            text,
            "must be the same number of tasks on every node",
            "Use srun --ntasks-per-node=1.",
        )
    tasks, all_tasks = int(match[1]), _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if all_tasks != tasks * num_nodes:
        rule = f"there are {all_tasks} tasks in this step, not the {tasks * num_nodes} of one component's nodes"
        way_out = "Start the launcher on one component: srun --het-group=0 --ntasks-per-node=1 ..."
        raise ConfigError("SLURM_STEP_TASKS_PER_NODE", text, rule, way_out)
    if all_tasks > 1 and environ.get("SLURM_PTY_PORT"):
        rule = f"this is the terminal of one of {all_tasks} tasks (srun --pty), and nobody starts the others"
        way_out = "Use the shell of salloc; or srun without --pty; or srun --nodes=1 --ntasks=1 --pty."
        raise ConfigError("SLURM_STEP_NUM_TASKS", all_tasks, rule, way_out)
    return tasks


def _local_rank(environ: Mapping[str, str], node: int, num_nodes: int, tasks: int) -> int:
    """The rank of a task on its node. Ranks of a node are consecutive: the fast parallelism is between neighbours."""
    way = environ.get("SLURM_DISTRIBUTION", "block")
    if num_nodes > 1 and way.partition(":")[0].partition("=")[0].lower() in ("cyclic", "plane", "arbitrary"):
        rule = "a node's ranks must follow each other"
        raise ConfigError("SLURM_DISTRIBUTION", way, rule, "Use srun --distribution=block.")
    rank = _number(environ, "SLURM_PROCID", 0, num_nodes * tasks - 1)
    local = _number(environ, "SLURM_LOCALID", 0, tasks - 1)
    if rank != node * tasks + local:
        rule = f"must be {node * tasks + local} for task {local} of node {node}: a node's ranks follow each other"
        raise ConfigError("SLURM_PROCID", rank, rule, "Use srun --distribution=block.")
    return local


def _node_order(environ: Mapping[str, str], num_nodes: int) -> NodeOrder:
    """The order of a step's nodes by switch, where Slurm knows the switches."""
    asked = environ.get(_ORDER_VARIABLE) or "switch"
    if asked not in ("slurm", "switch"):
        rule = "must be slurm (the order in which Slurm numbers the nodes) or switch (nodes of one switch side by side)"
        raise ConfigError(_ORDER_VARIABLE, asked, rule, "Unset it for switch, where Slurm knows the switches.")
    has_switches = "switch" in environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "")
    if num_nodes < 3 or asked == "slurm" or not has_switches:
        return NodeOrder(places=tuple(range(num_nodes)))
    if shutil.which("scontrol") is None:
        line = (
            "ranks are given to nodes in Slurm's order: the order by switch needs scontrol, which is not on PATH here"
        )
        return NodeOrder(places=tuple(range(num_nodes)), line=line)
    way_out = f"Set {_ORDER_VARIABLE}=slurm to keep Slurm's order of nodes."
    nodes = expand_hosts(environ["SLURM_STEP_NODELIST"])
    return order_by_switch(nodes, _scontrol("show", "topology", field="SLURM_TOPOLOGY_ADDR", way_out=way_out))


def _port(environ: Mapping[str, str], job: int) -> int:
    """MASTER_PORT, else a port that depends on the job and the step only, so that every node has the same.

    It is below the range from which systems take ports of outgoing connections (32768 and up on Linux).
    """
    asked = environ.get("MASTER_PORT")
    if asked and not (asked.isdecimal() and 1 <= int(asked) <= 65535):
        rule = "must be a port number, 1 to 65535"
        raise ConfigError(
            "MASTER_PORT", asked, rule, "Unset it for a port per job, or set a free one, for example 29500."
        )
    step = _number(environ, "SLURM_STEP_ID", 0) if "SLURM_STEP_ID" in environ else 0
    return int(asked) if asked else _FIRST_PORT + (job * 7 + step) % _NUM_PORTS


def _refuse_taken_port(port: int) -> None:
    if _is_taken(port):
        rule = "another program on this node listens on it, and the ranks are to meet there"
        raise ConfigError("MASTER_PORT", port, rule, "Set MASTER_PORT to a free port, for example 29501.")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of the ranks does
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _address(environ: Mapping[str, str]) -> str:
    """The address of the first node: MASTER_ADDR, else Slurm's NodeAddr, else the node's name."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    nodelist = environ.get("SLURM_STEP_NODELIST", "")
    components = [value for name, value in environ.items() if name.startswith("SLURM_NODELIST_HET_GROUP_")]
    if components and nodelist not in components:
        rule = "this step is on several components of the job, and Slurm's list need not begin with the node of task 0"
        way_out = "Set MASTER_ADDR to that node, or use one component: srun --het-group=0 --ntasks-per-node=1 ..."
        raise ConfigError("SLURM_STEP_NODELIST", nodelist, rule, way_out)
    first = first_host(nodelist)
    if shutil.which("scontrol") is None:
        _check_name(first)
        return first
    # Where node names are not host names (tests, clouds), Slurm's NodeAddr is the one that works.
    way_out = "Set MASTER_ADDR to the first node's address."
    shown = _scontrol("show", "node", first, "--oneliner", field="MASTER_ADDR", way_out=way_out)
    match = re.search(r"NodeAddr=(\S+)", shown)
    return match[1] if match else first


def _check_name(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        rule = f"is not set, the name {host} has no address here, and scontrol, which knows it, is not on PATH"
        way_out = "Add Slurm's programs to PATH, or set MASTER_ADDR to the first node."
        raise ConfigError("MASTER_ADDR", None, rule, way_out) from None


def first_host(nodelist: str) -> str:
    """The first name of a list of nodes, which Slurm compresses: `rack[1-2]n[07-09,12],m3` begins with `rack1n07`.

    Raises:
        ConfigError: it is no such list.
    """
    first = re.match(r"(?:[^\[\],\s]|\[\d[\d,-]*\])+", nodelist)
    if first is None or nodelist[first.end() :][:1] not in ("", ","):
        rule = "must be a list of nodes as Slurm writes it, for example n[1-4]"
        raise ConfigError("SLURM_STEP_NODELIST", nodelist, rule, "Set MASTER_ADDR to the first node's address.")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first[0])


def _scontrol(*arguments: str, field: str, way_out: str) -> str:
    done = subprocess.run(["scontrol", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        rule = f"`scontrol {' '.join(arguments)}` failed: {done.stderr.strip() or done.returncode}"
        raise ConfigError(field, os.environ.get(field), rule, way_out)
    return done.stdout
