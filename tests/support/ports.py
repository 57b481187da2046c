"""TCP ports for the jobs of tests."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from pathlib import Path

_FIRST, _LAST = 20000, 29000  # below the ports which the kernel gives to outgoing connections, and Megatron's 29500


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that no other test is given for a long while.

    A job binds its port only when its first rank has come up. By then a port that the kernel hands out for the asking
    (`bind` to 0) may be the near end of somebody's connection. Here each call, in whatever process, goes on where the
    last one ended.
    """
    ports: list[int] = []
    counter = Path(tempfile.gettempdir()) / f"megatron_smartmoe_ports_{os.getuid()}"
    with counter.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or _LAST)
        while len(ports) < count:
            port = port + 1 if _FIRST <= port < _LAST else _FIRST
            with contextlib.suppress(OSError), socket.socket() as listener:
                listener.bind(("", port))
                ports.append(port)
        file.truncate(0)
        file.write(str(port))
    return ports
