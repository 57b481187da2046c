"""Where the ranks run, from the variables that a real Slurm 22.05 sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.adapter.launch.topology import Topology, find_topology, reports_errors
from megatron_smartmoe.errors import ConfigError

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
# Batch script of `sbatch -N2 --ntasks-per-node=1`: it looks like task 0 of the job, but has no step.
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
# Second task of `srun --ntasks-per-node=1`.
NODE_TASK = STEP | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
}
# Last task of `srun -N2 --ntasks-per-node=2`.
RANK_TASK = STEP | {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
ONE_NODE = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0"}
SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
  "show node n1 --oneliner") echo "NodeName=n1 Arch=x86_64 {address} NodeHostName=host Version=22.05" ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


def install_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    program = folder / "scontrol"
    program.write_text(SCONTROL.format(address=address))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("MASTER_ADDR", raising=False)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_scontrol(tmp_path, monkeypatch, "NodeAddr=127.0.0.5")


@pytest.fixture
def no_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def test_outside_slurm(no_scontrol: None) -> None:
    topology = find_topology(4, {"SLURM_CONF": "/etc/slurm.conf"})
    assert topology == Topology(ranks_per_node=4)
    assert topology.world_size == 4
    assert topology.is_reporter


def test_a_batch_script_of_two_nodes_needs_srun(no_scontrol: None) -> None:
    topology = find_topology(2, BATCH)
    assert topology == Topology(num_nodes=2, ranks_per_node=2, needs_srun=True)
    assert topology.world_size == 4


def test_a_batch_script_of_one_node_needs_srun_too(no_scontrol: None) -> None:
    topology = find_topology(2, BATCH | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"})
    assert topology == Topology(num_nodes=1, ranks_per_node=2, needs_srun=True)


def test_a_task_per_node_starts_the_ranks_of_its_node(scontrol: None) -> None:
    topology = find_topology(4, NODE_TASK)
    assert topology == Topology(
        num_nodes=2, node=1, ranks_per_node=4, master_addr="127.0.0.5", master_port=20049, rank=None
    )
    assert topology.world_size == 8
    assert not topology.is_reporter


def test_the_first_task_of_a_node_each_speaks(scontrol: None) -> None:
    assert find_topology(4, NODE_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).is_reporter


def test_a_task_per_rank_is_that_rank(scontrol: None) -> None:
    topology = find_topology(1, RANK_TASK)
    assert topology == Topology(
        num_nodes=2, node=1, ranks_per_node=2, master_addr="127.0.0.5", master_port=20049, rank=3
    )
    assert topology.world_size == 4


@pytest.mark.parametrize(("rank", "node", "speaks"), [(0, 0, True), (1, 0, False), (2, 1, False), (3, 1, False)])
def test_only_rank_0_speaks(scontrol: None, rank: int, node: int, speaks: bool) -> None:
    environ = RANK_TASK | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node)}
    assert find_topology(1, environ).is_reporter is speaks


def test_one_node_needs_no_address(no_scontrol: None) -> None:
    environ = RANK_TASK | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    topology = find_topology(1, environ | {"SLURM_PROCID": "1"})
    assert (topology.num_nodes, topology.ranks_per_node, topology.rank) == (1, 2, 1)
    assert topology.master_addr == "127.0.0.1"


def test_a_step_of_one_task_starts_the_ranks(no_scontrol: None) -> None:
    environ = NODE_TASK | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    topology = find_topology(4, environ | {"SLURM_PROCID": "0"})
    assert (topology.num_nodes, topology.ranks_per_node, topology.rank) == (1, 4, None)


def test_a_node_without_an_address_is_reached_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_scontrol(tmp_path, monkeypatch, "Features=none")
    assert find_topology(1, NODE_TASK).master_addr == "n1"


def test_master_addr_has_the_last_word(no_scontrol: None) -> None:
    assert find_topology(1, NODE_TASK | {"MASTER_ADDR": "10.0.0.1"}).master_addr == "10.0.0.1"


def test_the_environment_is_this_processs_own(scontrol: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (NODE_TASK | {"MASTER_ADDR": "10.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert find_topology(4) == find_topology(4, NODE_TASK | {"MASTER_ADDR": "10.0.0.1"})
    assert not reports_errors()


def test_ports(scontrol: None) -> None:
    """The same for all tasks of a step; another for another job and another step; MASTER_PORT wins."""

    def port(**changes: str) -> int:
        return find_topology(1, NODE_TASK | changes).master_port

    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0") == 20049
    assert port(SLURM_STEP_ID="1") == 20050
    assert port(SLURM_JOB_ID="8") == 20056
    assert all(20000 <= port(SLURM_JOB_ID=str(job)) < 40000 for job in (1, 2857, 2858, 10**8))
    assert port(MASTER_PORT="1234") == 1234
    assert (port(MASTER_PORT="1"), port(MASTER_PORT="65535")) == (1, 65535)
    assert port(MASTER_PORT="") == 20049


@pytest.mark.parametrize("text", ["2,1", "2(x2),1", "2(x3)", "2", ""])
def test_unequal_tasks_are_refused(scontrol: None, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, RANK_TASK | {"SLURM_STEP_TASKS_PER_NODE": text})
    assert str(caught.value) == (
        f"SLURM_STEP_TASKS_PER_NODE = {text!r}: must be the same number of tasks on every node. "
        "Use srun --ntasks-per-node=1."
    )


def test_a_missing_scontrol_is_said(no_scontrol: None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, NODE_TASK)
    assert str(caught.value) == (
        "MASTER_ADDR = None: is not set, and scontrol, which lists the nodes' addresses, is not on PATH. "
        "Add Slurm's programs to PATH, or set MASTER_ADDR to the first node."
    )


def test_a_scontrol_that_fails_is_said(scontrol: None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, NODE_TASK | {"SLURM_STEP_NODELIST": "gone"})
    assert str(caught.value) == (
        "MASTER_ADDR = None: `scontrol show hostnames gone` failed: unexpected: show hostnames gone. "
        "Set MASTER_ADDR to the first node's address."
    )


@pytest.mark.parametrize("port", ["auto", "-1", "1e4", "0", "65536"])
def test_a_wrong_port_is_said(scontrol: None, port: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, NODE_TASK | {"MASTER_PORT": port})
    assert str(caught.value) == (
        f"MASTER_PORT = '{port}': must be a port number, 1 to 65535. Unset it for a port per job, "
        "or set a free one, for example 29500."
    )


@pytest.mark.parametrize(
    ("environ", "speaks"),
    [
        ({}, True),
        (BATCH, True),
        (NODE_TASK, False),
        (NODE_TASK | {"SLURM_PROCID": "0"}, True),
        (RANK_TASK, False),
        (RANK_TASK | {"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, True),
    ],
    ids=["no Slurm", "batch", "node 1", "node 0", "rank 3", "rank 0", "no step"],
)
def test_errors_are_reported_by_task_0_only(environ: dict[str, str], speaks: bool) -> None:
    assert reports_errors(environ) is speaks
