"""A link between two ranks that can be cut: each has a network namespace of its own, and a cable joins the two.

When the link goes down nobody is told: no connection is reset, messages are lost, as when a node vanishes.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from pathlib import Path

DEVICE, ADDRESSES = "smoe", ("10.213.0.1", "10.213.0.2")
TIMEOUT_MINUTES = 1  # of the collectives, in jobs whose link is cut: Megatron's default is 10
WAIT_S = 60.0


@functools.cache
def can_cut() -> bool:
    """Whether this user may make network namespaces and devices here."""
    if any(shutil.which(program) is None for program in ("ip", "nsenter", "unshare")):
        return False
    make = f"ip link add {DEVICE} type veth peer name {DEVICE}2 && ip link set {DEVICE} up"
    return subprocess.run(["unshare", "--net", "sh", "-c", make], check=False, capture_output=True).returncode == 0


def enter(folder: Path, rank: int) -> None:
    """In a rank: leave for a network of its own, and wait until the cable is plugged in."""
    os.unshare(os.CLONE_NEWNET)
    (folder / f"network{rank}").write_text(str(os.getpid()), encoding="ascii")
    _wait_for(folder / "cable")
    os.environ |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": DEVICE}


def plug_in(folder: Path) -> None:
    """In the harness: join the networks of the two ranks."""
    pids = []
    for rank in range(len(ADDRESSES)):
        _wait_for(folder / f"network{rank}")
        pids.append((folder / f"network{rank}").read_text(encoding="ascii"))
    _ip("link", "add", DEVICE, "netns", pids[0], "type", "veth", "peer", "name", DEVICE, "netns", pids[1])
    for pid, address in zip(pids, ADDRESSES, strict=True):
        for command in (f"addr add {address}/24 dev {DEVICE}", f"link set {DEVICE} up", "link set lo up"):
            subprocess.run(["nsenter", "--target", pid, "--net", "ip", *command.split()], check=True)
    (folder / "cable").touch()


def cut() -> None:
    """In a rank: take the link down."""
    _ip("link", "set", DEVICE, "down")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not file.exists() or (not file.read_bytes() and file.name != "cable"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file}: no such file after {WAIT_S:.0f} s")
        time.sleep(0.02)
