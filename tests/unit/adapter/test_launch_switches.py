"""The order of nodes by the switches that Slurm knows."""

from __future__ import annotations

import pytest

from megatron_smartmoe.adapter.launch.switches import expand_hosts, order_by_switch

TREE = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n1,n4
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[2,6]
SwitchName=leaf3 Level=0 LinkSpeed=1 Nodes=n[3,5]
SwitchName=spine1 Level=1 LinkSpeed=1 Nodes=n[1,3-5] Switches=leaf[1,3]
SwitchName=spine2 Level=1 LinkSpeed=1 Nodes=n[2,6] Switches=leaf2
SwitchName=core Level=2 LinkSpeed=1 Nodes=n[1-6] Switches=spine[1-2]
"""


def test_nodes_of_a_switch_follow_each_other_at_every_level() -> None:
    found = order_by_switch([f"n{number}" for number in range(1, 7)], TREE)
    assert found.places == (0, 4, 2, 1, 3, 5)
    assert found.line == "ranks are given to nodes switch by switch (leaf1: n1 n4, leaf3: n3 n5, leaf2: n2 n6)"


def test_the_first_node_stays_the_first() -> None:
    found = order_by_switch(["n3", "n2", "n1"], TREE)
    assert found.places == (0, 2, 1)


@pytest.mark.parametrize("topology", ["", "SwitchName=one Level=0 Nodes=n[1-3]\n"])
def test_without_switches_or_with_one_slurms_order_stays(topology: str) -> None:
    found = order_by_switch(["n2", "n1", "n3"], topology)
    assert (found.places, found.line) == ((0, 1, 2), "")


def test_a_node_at_no_switch_is_said() -> None:
    assert "no switch: x" in order_by_switch(["n1", "x", "n4"], TREE).line


def test_a_long_line_is_cut() -> None:
    tree = "\n".join(f"SwitchName=leaf{number} Level=0 Nodes=node{number}" for number in range(100))
    line = order_by_switch([f"node{number}" for number in range(100)], tree).line
    assert len(line) < 400
    assert line.endswith(" ...)")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"),
        ("n[1-3,7],m2", "n1 n2 n3 n7 m2"),
        ("rack[1-2]n[07-09]", "rack1n07 rack1n08 rack1n09 rack2n07 rack2n08 rack2n09"),
        ("n[099-101]x", "n099x n100x n101x"),
        ("", ""),
    ],
)
def test_lists_of_nodes(text: str, names: str) -> None:
    assert expand_hosts(text) == names.split()
