"""Nodes of a cluster as network namespaces of one machine, with links whose rates are set.

Every node is a namespace with one network card, a veth pair whose other end is on a bridge in a namespace of its own.
Token bucket filters limit what a card sends, what it receives, and what the ranks of one node send to each other, which
goes over the node's loopback device. Nothing outside of these namespaces is changed, and they go with the block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_BURST = "256kb"  # above the largest packet of a loopback device, 64 kB
_QUEUE = "400ms"  # longest wait in a filter, beyond which packets are dropped


def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    probe = f"probe{os.getpid()}"
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if added.returncode:
        return f"network namespaces cannot be made here: {added.stderr.strip()}"
    shaped = ["tc", "-n", probe, "qdisc", "add", "dev", "lo", "root", "tbf", *_filter("1gbit")]
    found = subprocess.run(shaped, capture_output=True, text=True, check=False)
    _run("ip", "netns", "del", probe)
    return f"links cannot be shaped here: {found.stderr.strip()}" if found.returncode else None


@contextmanager
def nodes(number: int, *, between: str, inside: str) -> Iterator[list[str]]:
    """Make the nodes; yields the name of each namespace. Node i has the address 10.99.0.(i + 1).

    Args:
        number: of nodes.
        between: rate of a node's card in each direction, as tc has it: 80mbit.
        inside: rate of what the ranks of a node send to each other.
    """
    switch = f"switch{os.getpid()}"
    names = [f"node{os.getpid()}x{index}" for index in range(number)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            _add_node(name, f"10.99.0.{index + 1}/24", switch, f"port{index}", between, inside)
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _add_node(name: str, address: str, switch: str, port: str, between: str, inside: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", name, "addr", "add", address, "dev", "eth0")
    for device in ("eth0", "lo"):
        _run("ip", "-n", name, "link", "set", device, "up")
    _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *_filter(between))
    _run("tc", "-n", switch, "qdisc", "add", "dev", port, "root", "tbf", *_filter(between))
    _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "tbf", *_filter(inside))


def _filter(rate: str) -> list[str]:
    return ["rate", rate, "burst", _BURST, "latency", _QUEUE]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
