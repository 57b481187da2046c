"""The order of a job's nodes by the switches of the network: nodes of one switch follow each other.

Slurm chooses nodes by its topology plugin and then numbers them by name. Where the names of racks and nodes do not say
which switch they are at, neighbours in rank, between which tensor, expert and pipeline parallelism send most, would be
any two nodes. Slurm knows the switches (`scontrol show topology`), so the launchers number the nodes again: at every
level of the tree, switches in the order of their first nodes. Node 0 stays node 0. All launchers compute one order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class NodeOrder:
    """The nodes of a job in the order in which ranks are given to them.

    Attributes:
        places: for each node, by Slurm's number of it, its number in this order.
        line: the order in words; empty where the switches say nothing about it.
    """

    places: tuple[int, ...]
    line: str = ""


def order_by_switch(nodes: Sequence[str], topology: str) -> NodeOrder:
    """The order of `nodes`, which Slurm lists in its own.

    Args:
        nodes: names of the job's nodes.
        topology: what `scontrol show topology` prints: a line per switch with `SwitchName`, `Level` (0 at the nodes)
            and `Nodes`.
    """
    index = {name: number for number, name in enumerate(nodes)}
    switches = sorted(_switches(topology), key=lambda switch: -switch[1])  # from the root to the nodes
    members = [(name, level, sorted(index[node] for node in below if node in index)) for name, level, below in switches]
    paths = [[(first[0], name) for name, _, first in members if number in first] for number in range(len(nodes))]
    order = sorted(range(len(nodes)), key=lambda number: ([first for first, _ in paths[number]], number))
    places = {number: place for place, number in enumerate(order)}
    leaves = [
        (leaf, [nodes[number] for number in group])
        for leaf, group in itertools.groupby(order, key=lambda number: paths[number][-1][1] if paths[number] else None)
    ]
    line = ""
    if len(leaves) > 1:
        text = ", ".join(f"{leaf or 'no switch'}: {' '.join(group)}" for leaf, group in leaves)
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
        line = f"ranks are given to nodes switch by switch ({shown})"
    return NodeOrder(places=tuple(places[number] for number in range(len(nodes))), line=line)


def _switches(topology: str) -> list[tuple[str, int, set[str]]]:
    """Name, level and nodes below of every switch."""
    found = []
    for line in topology.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("SwitchName") and fields.get("Level", "").isdecimal():
            found.append((fields["SwitchName"], int(fields["Level"]), set(expand_hosts(fields.get("Nodes", "")))))
    return found


def expand_hosts(nodelist: str) -> list[str]:
    """The names in a list of nodes as Slurm writes it: `rack[1-2]n[07-09,12],m3`."""
    names: list[str] = []
    for word in re.findall(r"(?:[^\[\],\s]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", word)  # text and what was in brackets, in turn
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        names += ["".join(each) for each in itertools.product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    """`07-09,12` has zeros in front where the first number of a range has them."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found
