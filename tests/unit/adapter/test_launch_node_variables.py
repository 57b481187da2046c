"""Nodes of jobs that Slurm does not run: flags, and what clusters set in the environment."""

from __future__ import annotations

import socket
from argparse import Namespace

import pytest

from megatron_smartmoe.adapter.launch.launcher import build_parser
from megatron_smartmoe.adapter.launch.node_variables import find_nodes, refuse_flags
from megatron_smartmoe.adapter.launch.topology import Topology, find_topology
from megatron_smartmoe.errors import ConfigError

SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
# What the training operator sets in a pod; WORLD_SIZE and RANK are there too, for those who start no torchrun.
KUBERNETES = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NPROC_PER_NODE": "4",
    "WORLD_SIZE": "8",
    "RANK": "1",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
}
OLD_KUBERNETES = {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
PLAIN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "16"}


def options(*argv: str) -> Namespace:
    return build_parser().parse_known_args(argv)[0]


@pytest.mark.parametrize(
    ("environ", "num_nodes", "node", "address", "port", "ranks", "source"),
    [
        (SKYPILOT, 2, 1, "10.0.0.1", 29500, None, "SkyPilot"),
        (KUBERNETES, 2, 1, "job-master-0", 23456, 4, "Kubernetes"),
        (KUBERNETES | {"PET_NPROC_PER_NODE": "auto"}, 2, 1, "job-master-0", 23456, None, "Kubernetes"),
        (OLD_KUBERNETES, 3, 2, "job-master-0", 23456, None, "Kubernetes"),
        (PLAIN, 2, 1, "10.0.0.1", 29500, None, "NNODES, NODE_RANK"),
        ({**PLAIN, "NNODES": "", "WORLD_SIZE": "2"}, 2, 1, "10.0.0.1", 29500, None, "WORLD_SIZE, NODE_RANK"),
        (SKYPILOT | PLAIN | {"NNODES": "7"}, 2, 1, "10.0.0.1", 29500, None, "SkyPilot"),
    ],
)
def test_what_clusters_set(
    environ: dict[str, str], num_nodes: int, node: int, address: str, port: int, ranks: int | None, source: str
) -> None:
    found = find_nodes(options(), environ)
    assert found is not None
    assert (found.num_nodes, found.node, found.master_addr, found.master_port) == (num_nodes, node, address, port)
    assert (found.ranks_per_node, found.source) == (ranks, source)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"},
        {"NODE_RANK": "0"},
        OLD_KUBERNETES | {"LOCAL_RANK": "2"},
        SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
    ],
)
def test_one_host_is_this_host(environ: dict[str, str]) -> None:
    assert find_nodes(options(), environ) is None


def test_flags_win_and_have_torchruns_names() -> None:
    found = find_nodes(options("--nnodes", "2", "--node-rank", "1", "--master-addr", "h", "--master-port", "7"), PLAIN)
    assert found is not None
    assert (found.num_nodes, found.node, found.master_addr, found.master_port) == (2, 1, "h", 7)


@pytest.mark.parametrize(
    ("argv", "environ", "text"),
    [
        ("--nnodes 0", {}, "--nnodes = 0: must be at least 1. "),
        ("--nnodes 2", {}, "--node-rank = None: each node has to know its number and where node 0 is. "),
        ("--nnodes 2 --node-rank 1", {}, "--master-addr = None: each node has to know its number"),
        ("--nnodes 2 --node-rank 2 --master-addr h", {}, "--node-rank = 2: must be from 0 to 1, one below --nnodes. "),
        ("--nnodes 2 --node-rank 0 --master-addr h --master-port 0", {}, "--master-port = 0: must be a port number"),
        ("--node-rank 1", {}, "--node-rank = 1: belongs to a job of several nodes, whose number is missing. "),
        ("", PLAIN | {"NNODES": "1:4"}, "NNODES = '1:4': must be a whole number, 1 or more: a job keeps the nodes"),
        ("", PLAIN | {"NODE_RANK": "2"}, "NODE_RANK = '2': must be a whole number, from 0 to 1. "),
        ("", PLAIN | {"MASTER_ADDR": ""}, "MASTER_ADDR = '': NNODES = 2, and nothing says where node 0 is. "),
        ("", PLAIN | {"MASTER_PORT": "x"}, "MASTER_PORT = 'x': must be a whole number, 1 or more. "),
        ("", PLAIN | {"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: must be a port number, 1 to 65535. "),
        ("", {"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "0", "RANK": "0"}, "LOCAL_RANK = '0': torchrun has started "),
    ],
)
def test_what_makes_no_sense_is_one_line(argv: str, environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_nodes(options(*argv.split()), environ)
    assert str(caught.value).startswith(text)


def test_slurm_knows_its_own_nodes() -> None:
    refuse_flags(options())
    with pytest.raises(ConfigError, match=r"--master-addr = 'h': the nodes of a Slurm job are known from Slurm\. "):
        refuse_flags(options("--master-addr", "h"))


def test_they_are_the_topology_of_the_job() -> None:
    nodes = find_nodes(options(), KUBERNETES)
    expected = Topology(
        num_nodes=2, node=1, ranks_per_node=4, master_addr="job-master-0", master_port=23456, source="Kubernetes"
    )
    assert find_topology(4, {}, nodes) == expected


def test_a_port_of_node_0_that_is_taken_is_refused_there() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        nodes = find_nodes(options(), PLAIN | {"NODE_RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(ConfigError, match="MASTER_PORT"):
            find_topology(1, {}, nodes)
