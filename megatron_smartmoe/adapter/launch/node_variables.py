"""The nodes of a job that Slurm does not run: from the launcher's flags, or from what a cluster sets for each process.

Everybody who starts one process per node says the same four things in other words. The first of these that is there
counts; flags win:

| who | nodes | this node | address of node 0 |
|---|---|---|---|
| flags, torchrun's names | `--nnodes` | `--node-rank` | `--master-addr`, `--master-port` |
| SkyPilot | `SKYPILOT_NUM_NODES` | `SKYPILOT_NODE_RANK` | first line of `SKYPILOT_NODE_IPS` |
| Kubeflow Trainer, PyTorchJob | `PET_NNODES` | `PET_NODE_RANK` | `PET_MASTER_ADDR`, `PET_MASTER_PORT` |
| plain variables (Ray, ssh loops) | `NNODES`, else `WORLD_SIZE` | `NODE_RANK` | `MASTER_ADDR`, `MASTER_PORT` |
| PyTorchJob, older | `WORLD_SIZE`, which counts pods | `RANK`, which counts pods | `MASTER_ADDR`, `MASTER_PORT` |

Where nothing of it is there, the job is this host.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_smartmoe.errors import ConfigError

DEFAULT_PORT = 29500  # torchrun's
_FLAGS = ("nnodes", "node_rank", "master_addr", "master_port")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a job, as one of them knows them.

    Attributes:
        num_nodes: nodes of the job, at least 1.
        node: this node's number, from 0.
        master_addr: address of node 0.
        master_port: port there.
        ranks_per_node: ranks on each node; None where the cluster leaves it to the number of GPUs.
        source: who said so, for a line at the start.
    """

    num_nodes: int
    node: int
    master_addr: str
    master_port: int
    ranks_per_node: int | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class _Convention:
    """The variables of one kind of cluster, for which the two of the nodes must be there; its name, if it has one."""

    source: str
    num_nodes: str
    node: str
    address: str
    port: str = "MASTER_PORT"
    ranks_per_node: str | None = None


_CONVENTIONS = (
    _Convention(
        source="SkyPilot", num_nodes="SKYPILOT_NUM_NODES", node="SKYPILOT_NODE_RANK", address="SKYPILOT_NODE_IPS"
    ),
    _Convention(
        source="Kubernetes",
        num_nodes="PET_NNODES",
        node="PET_NODE_RANK",
        address="PET_MASTER_ADDR",
        port="PET_MASTER_PORT",
        ranks_per_node="PET_NPROC_PER_NODE",
    ),
    _Convention(source="", num_nodes="NNODES", node="NODE_RANK", address="MASTER_ADDR"),
    _Convention(source="", num_nodes="WORLD_SIZE", node="NODE_RANK", address="MASTER_ADDR"),
    _Convention(source="Kubernetes", num_nodes="WORLD_SIZE", node="RANK", address="MASTER_ADDR"),
)


def find_nodes(options: Namespace, environ: Mapping[str, str] = os.environ) -> Nodes | None:
    """The nodes of the job that this process belongs to; None for this host alone.

    Args:
        options: the launcher's flags `nnodes`, `node_rank`, `master_addr` and `master_port`, None where not given.
        environ: the environment.

    Raises:
        ConfigError: a flag or variable makes no sense, or one of several that belong together is missing; or this
            process is itself a rank that torchrun has started.
    """
    given = [name for name in _FLAGS if getattr(options, name, None) is not None]
    if given:
        return _from_flags(options)
    if "TORCHELASTIC_RUN_ID" in environ and "LOCAL_RANK" in environ:
        rule = "torchrun has started this process as one of several ranks, and the launcher starts torchrun itself"
        way_out = "Start the launcher once per node without torchrun, or have torchrun start the ranks' own entry: "
        way_out += "torchrun ... --module megatron_smartmoe.adapter.pretrain FLAGS."
        raise ConfigError("LOCAL_RANK", environ["LOCAL_RANK"], rule, way_out)
    for convention in _CONVENTIONS:
        if convention.node == "RANK" and "LOCAL_RANK" in environ:
            continue  # they count ranks, and were left behind by somebody who started one
        if environ.get(convention.num_nodes) and environ.get(convention.node):
            found = _from_variables(convention, environ)
            return None if found.num_nodes == 1 else found
    return None


def refuse_flags(options: Namespace) -> None:
    """In a Slurm job the nodes are Slurm's.

    Raises:
        ConfigError: a flag says otherwise.
    """
    for name in _FLAGS:
        value = getattr(options, name, None)
        if value is not None:
            way_out = "Remove it, or run `unset SLURM_JOB_ID` first."
            raise ConfigError(_flag(name), value, "the nodes of a Slurm job are known from Slurm", way_out)


def _from_flags(options: Namespace) -> Nodes:
    num_nodes = options.nnodes
    if num_nodes is None:
        name = next(name for name in _FLAGS if getattr(options, name) is not None)
        rule = "belongs to a job of several nodes, whose number is missing"
        raise ConfigError(_flag(name), getattr(options, name), rule, "Add --nnodes N, the number of nodes.")
    if num_nodes < 1:
        raise ConfigError("--nnodes", num_nodes, "must be at least 1", "Pass the number of nodes.")
    missing = [name for name in ("node_rank", "master_addr") if getattr(options, name) is None]
    if num_nodes > 1 and missing:
        rule = "each node has to know its number and where node 0 is"
        way_out = f"Add {' and '.join(_flag(name) for name in missing)}, as for torchrun."
        raise ConfigError(_flag(missing[0]), None, rule, way_out)
    node = options.node_rank or 0
    if not 0 <= node < num_nodes:
        rule = f"must be from 0 to {num_nodes - 1}, one below --nnodes"
        raise ConfigError("--node-rank", node, rule, "Give every node its own number.")
    port = DEFAULT_PORT if options.master_port is None else options.master_port
    _check_port("--master-port", port)
    return Nodes(
        num_nodes=num_nodes,
        node=node,
        master_addr=options.master_addr or "127.0.0.1",
        master_port=port,
        source="--nnodes",
    )


def _from_variables(convention: _Convention, environ: Mapping[str, str]) -> Nodes:
    num_nodes = _number(convention.num_nodes, environ, 1)
    node = _number(convention.node, environ, 0, num_nodes - 1)
    address = environ.get(convention.address, "").strip().partition("\n")[0].strip()
    if num_nodes > 1 and not address:
        rule = f"{convention.num_nodes} = {num_nodes}, and nothing says where node 0 is"
        way_out = f"Set {convention.address}, or pass --nnodes, --node-rank and --master-addr."
        raise ConfigError(convention.address, environ.get(convention.address), rule, way_out)
    port = _number(convention.port, environ, 1) if environ.get(convention.port) else DEFAULT_PORT
    _check_port(convention.port, port)
    ranks = environ.get(convention.ranks_per_node or "", "")
    return Nodes(
        num_nodes=num_nodes,
        node=node,
        master_addr=address or "127.0.0.1",
        master_port=port,
        ranks_per_node=int(ranks) if ranks.isascii() and ranks.isdecimal() and int(ranks) > 0 else None,
        source=convention.source or f"{convention.num_nodes}, {convention.node}",
    )


def _number(name: str, environ: Mapping[str, str], least: int, most: int | None = None) -> int:
    text = environ[name].strip()
    way_out = "Correct it where the job is started, or pass --nnodes, --node-rank and --master-addr."
    note = ": a job keeps the nodes that it starts with" if ":" in text else ""  # torchrun's MIN:MAX
    return whole_number(name, text, least, most, way_out, note)


def whole_number(name: str, text: str, least: int, most: int | None, way_out: str, note: str = "") -> int:
    """A variable of the environment that is a whole number.

    Args:
        name: of the variable.
        text: its value.
        least: the smallest that makes sense.
        most: the largest; None for no limit.
        way_out: what to do about another value.
        note: added to the rule.

    Raises:
        ConfigError: it is none, or outside the limits.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) < least or (most is not None and int(text) > most):
        limits = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ConfigError(name, text, f"must be a whole number, {limits}{note}", way_out)
    return int(text)


def _check_port(name: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError(name, port, "must be a port number, 1 to 65535", "Pass a free one, for example 29500.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
