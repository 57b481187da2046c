"""Where the ranks run, from the variables that a real Slurm 22.05 sets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.launch import topology
from megatron_smartmoe.adapter.launch.topology import (
    Topology,
    find_topology,
    first_host,
    port_of_steps,
    reports_errors,
)
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
  "show node n1 --oneliner") echo "NodeName=n1 Arch=x86_64 {address} NodeHostName=host Version=22.05" ;;
  "show topology") echo "SwitchName=a Level=0 Nodes=n1,n3"; echo "SwitchName=b Level=0 Nodes=n2,n4" ;;
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
    found = find_topology(4, {"SLURM_CONF": "/etc/slurm.conf"})
    assert found == Topology(ranks_per_node=4)
    assert found.world_size == 4
    assert found.is_reporter


def test_a_batch_script_of_two_nodes_needs_srun(no_scontrol: None) -> None:
    found = find_topology(2, BATCH)
    assert found == Topology(num_nodes=2, ranks_per_node=2, needs_srun=True)
    assert found.world_size == 4


def test_a_batch_script_of_one_node_needs_srun_too(no_scontrol: None) -> None:
    found = find_topology(2, BATCH | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"})
    assert found == Topology(num_nodes=1, ranks_per_node=2, needs_srun=True)


def test_a_task_per_node_starts_the_ranks_of_its_node(scontrol: None) -> None:
    found = find_topology(4, NODE_TASK)
    assert found == Topology(
        num_nodes=2, node=1, ranks_per_node=4, master_addr="127.0.0.5", master_port=20049, rank=None
    )
    assert found.world_size == 8
    assert not found.is_reporter


def test_the_first_task_of_a_node_each_speaks(scontrol: None) -> None:
    assert find_topology(4, NODE_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).is_reporter


def test_a_task_per_rank_is_that_rank(scontrol: None) -> None:
    found = find_topology(1, RANK_TASK)
    assert found == Topology(num_nodes=2, node=1, ranks_per_node=2, master_addr="127.0.0.5", master_port=20049, rank=3)
    assert found.world_size == 4


FOUR = {
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "5",
    "SLURM_TOPOLOGY_ADDR": "a.n3",
    "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node",
}


def test_nodes_of_one_switch_have_consecutive_ranks(scontrol: None) -> None:
    """Of n1 and n3 at one switch, n2 and n4 at the other, n3 is the second node."""
    found = find_topology(1, RANK_TASK | FOUR)
    assert (found.node, found.rank) == (1, 3)
    assert found.order == "ranks are given to nodes switch by switch (a: n1 n3, b: n2 n4)"
    kept = find_topology(1, RANK_TASK | FOUR | {"SMARTMOE_NODE_ORDER": "slurm"})
    assert (kept.node, kept.rank, kept.order) == (2, 5, "")
    unknown = find_topology(1, RANK_TASK | FOUR | {"SLURM_TOPOLOGY_ADDR_PATTERN": "node"})
    assert (unknown.node, unknown.rank, unknown.order) == (2, 5, "")


def test_an_unknown_order_is_refused(scontrol: None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, RANK_TASK | FOUR | {"SMARTMOE_NODE_ORDER": "rack"})
    assert str(caught.value) == (
        "SMARTMOE_NODE_ORDER = 'rack': must be slurm (the order in which Slurm numbers the nodes) or switch (nodes of "
        "one switch side by side). Unset it for switch, where Slurm knows the switches."
    )


def test_without_scontrol_slurms_order_stays_and_is_said(no_scontrol: None) -> None:
    found = find_topology(1, RANK_TASK | FOUR | {"MASTER_ADDR": "127.0.0.1"})
    assert (found.node, found.rank) == (2, 5)
    assert found.order == (
        "ranks are given to nodes in Slurm's order: the order by switch needs scontrol, which is not on PATH here"
    )


@pytest.mark.parametrize(("rank", "node", "speaks"), [(0, 0, True), (1, 0, False), (2, 1, False), (3, 1, False)])
def test_only_rank_0_speaks(scontrol: None, rank: int, node: int, speaks: bool) -> None:
    environ = RANK_TASK | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(rank % 2)}
    assert find_topology(1, environ).is_reporter is speaks


def test_one_node_needs_no_address(no_scontrol: None) -> None:
    environ = RANK_TASK | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    found = find_topology(1, environ | {"SLURM_PROCID": "1"})
    assert (found.num_nodes, found.ranks_per_node, found.rank) == (1, 2, 1)
    assert found.master_addr == "127.0.0.1"


def test_a_step_of_one_task_starts_the_ranks(no_scontrol: None) -> None:
    environ = NODE_TASK | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    found = find_topology(4, environ | {"SLURM_PROCID": "0"})
    assert (found.num_nodes, found.ranks_per_node, found.rank) == (1, 4, None)


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
    assert all(20000 <= port(SLURM_JOB_ID=str(job)) < 30000 for job in (1, 2857, 2858, 10**8))
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


def test_without_scontrol_the_first_nodes_name_is_the_address(
    no_scontrol: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology.socket, "getaddrinfo", lambda host, port: [])
    assert find_topology(1, NODE_TASK).master_addr == "n1"


def test_without_scontrol_a_name_that_is_no_host_is_said(no_scontrol: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: None) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(topology.socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError) as caught:
        find_topology(1, NODE_TASK)
    assert str(caught.value) == (
        "MASTER_ADDR = None: is not set, the name n1 has no address here, and scontrol, which knows it, is not on "
        "PATH. Add Slurm's programs to PATH, or set MASTER_ADDR to the first node."
    )


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[007-012,020]", "n007"),
        ("gpu-a[3,5-9],login1", "gpu-a3"),
        ("rack[1-2]n[07-09,12],m3", "rack1n07"),
        ("node[5].cluster.org", "node5.cluster.org"),
    ],
)
def test_compressed_lists_of_nodes(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", "n[1-2", "n]1[", "[", ",n1", "n[a-b]", "n1 n2", "n[]"])
def test_a_list_that_is_none_is_said(nodelist: str) -> None:
    with pytest.raises(ConfigError) as caught:
        first_host(nodelist)
    assert str(caught.value) == (
        f"SLURM_STEP_NODELIST = {nodelist!r}: must be a list of nodes as Slurm writes it, for example n[1-4]. "
        "Set MASTER_ADDR to the first node's address."
    )


def test_a_scontrol_that_fails_is_said(scontrol: None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, NODE_TASK | {"SLURM_STEP_NODELIST": "gone"})
    assert str(caught.value) == (
        "MASTER_ADDR = None: `scontrol show node gone --oneliner` failed: unexpected: show node gone --oneliner. "
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


# --- odd environments: right, or one line

OUTSIDE = "Start the launcher with srun, or run `unset SLURM_JOB_ID` first to use this host alone."


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        find_topology(1, environ)
    return str(caught.value)


@pytest.mark.parametrize("step", ["4294967290", "interactive"])
def test_the_shell_of_salloc_in_a_step_of_its_own_starts_srun(no_scontrol: None, step: str) -> None:
    """With use_interactive_step it is a task of a step on the first node, and the job has more nodes than the step."""
    shell = NODE_TASK | ONE_NODE | {"SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1"}
    assert find_topology(2, shell) == Topology(num_nodes=2, ranks_per_node=2, needs_srun=True)
    assert reports_errors(shell)


def test_one_terminal_of_several_tasks_is_refused(scontrol: None) -> None:
    assert refusal(NODE_TASK | {"SLURM_PTY_PORT": "41234"}) == (
        "SLURM_STEP_NUM_TASKS = 2: this is the terminal of one of 2 tasks (srun --pty), and nobody starts the others. "
        "Use the shell of salloc; or srun without --pty; or srun --nodes=1 --ntasks=1 --pty."
    )
    alone = (
        NODE_TASK | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PTY_PORT": "1"}
    )
    assert find_topology(4, alone).world_size == 4


def test_a_heterogeneous_job_is_refused(no_scontrol: None) -> None:
    way_out = "Start the launcher on one of them: srun --het-group=0 --ntasks-per-node=1 ..."
    assert refusal(BATCH | {"SLURM_HET_SIZE": "2"}) == (
        "SLURM_HET_SIZE = '2': the job has several components (a heterogeneous job), and ranks need nodes of one kind. "
        + way_out
    )


def test_a_step_over_several_components_is_refused(scontrol: None) -> None:
    way_out = "Start the launcher on one component: srun --het-group=0 --ntasks-per-node=1 ..."
    assert refusal(NODE_TASK | {"SLURM_STEP_NUM_TASKS": "3"}) == (
        "SLURM_STEP_TASKS_PER_NODE = '1(x2)': there are 3 tasks in this step, not the 2 of one component's nodes. "
        + way_out
    )


HET = {"SLURM_HET_SIZE": "2", "SLURM_NODELIST_HET_GROUP_0": "n[1-2]", "SLURM_NODELIST_HET_GROUP_1": "n3"}


def test_a_step_on_one_component_is_right(scontrol: None) -> None:
    assert find_topology(4, NODE_TASK | HET).world_size == 8


def test_a_step_on_several_components_needs_the_address_of_its_first_task(scontrol: None) -> None:
    nodes = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"}
    several = NODE_TASK | HET | nodes | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert refusal(several) == (
        "SLURM_STEP_NODELIST = 'n[1-3]': this step is on several components of the job, and Slurm's list need not "
        "begin with the node of task 0. Set MASTER_ADDR to that node, or use one component: "
        "srun --het-group=0 --ntasks-per-node=1 ..."
    )
    assert find_topology(1, several | {"MASTER_ADDR": "n3"}).num_nodes == 3


def test_ranks_that_are_dealt_out_over_the_nodes_are_refused(scontrol: None) -> None:
    """srun --distribution=cyclic: rank 1 is on node 1, and LOCAL_RANK 0 there. Task 0 is where it would be anyway."""
    first = RANK_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    for way in ("cyclic", "plane=1", "arbitrary", "cyclic:block"):
        assert refusal(first | {"SLURM_DISTRIBUTION": way}) == (
            f"SLURM_DISTRIBUTION = '{way}': a node's ranks must follow each other. Use srun --distribution=block."
        )
    assert find_topology(1, first | {"SLURM_DISTRIBUTION": "block:cyclic"}).rank == 0
    assert refusal(RANK_TASK | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}) == (
        "SLURM_PROCID = 1: must be 2 for task 0 of node 1: a node's ranks follow each other. "
        "Use srun --distribution=block."
    )


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("SLURM_STEP_NUM_NODES", "1 or more"),
        ("SLURM_NODEID", "from 0 to 1"),
        ("SLURM_PROCID", "from 0 to 3"),
        ("SLURM_LOCALID", "from 0 to 1"),
    ],
)
def test_variables_of_a_step_that_are_missing_or_odd(scontrol: None, name: str, limits: str) -> None:
    without = {key: value for key, value in RANK_TASK.items() if key != name}
    assert refusal(without) == f"{name} = None: is not set, although SLURM_JOB_ID is. {OUTSIDE}"
    for odd in ("", "x", "-1", "1.5", "٣", "99999999999999999999"):
        if name != "SLURM_STEP_NUM_NODES" or odd != "99999999999999999999":
            assert refusal(RANK_TASK | {name: odd}) == f"{name} = {odd!r}: must be a whole number, {limits}. {OUTSIDE}"


def test_variables_of_a_job_that_are_missing_or_odd(no_scontrol: None) -> None:
    assert refusal({"SLURM_JOB_ID": "7"}) == f"SLURM_NNODES = None: is not set, although SLURM_JOB_ID is. {OUTSIDE}"
    assert find_topology(1, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "3"}).num_nodes == 3
    assert refusal(BATCH | {"SLURM_JOB_ID": "7_1"}).startswith(
        "SLURM_JOB_ID = '7_1': must be a whole number, 1 or more"
    )
    without = {key: value for key, value in NODE_TASK.items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    assert refusal(without | {"MASTER_ADDR": "n1"}).startswith(
        "SLURM_STEP_TASKS_PER_NODE = '': must be the same number"
    )


def test_a_taken_port_is_said_by_node_0(scontrol: None) -> None:
    first = NODE_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert refusal(first | {"MASTER_PORT": port}) == (
            f"MASTER_PORT = {port}: another program on this node listens on it, and the ranks are to meet there. "
            "Set MASTER_PORT to a free port, for example 29501."
        )
        assert find_topology(1, NODE_TASK | {"MASTER_PORT": port}).master_port == int(port)  # node 1 listens on nothing
    assert find_topology(1, first | {"MASTER_PORT": port}).master_port == int(port)


def test_a_batch_script_gives_its_steps_a_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = BATCH | {"SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n[1-2]"}
    monkeypatch.setattr(topology, "_is_taken", lambda port: port == 20049)
    assert port_of_steps(batch) == 20110
    assert port_of_steps(batch | {"MASTER_PORT": "5"}) is None
    assert port_of_steps(batch | {"SLURMD_NODENAME": "n2"}) is None
    assert port_of_steps(BATCH) is None  # a shell of salloc on a login node


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
