"""`python -m megatron_smartmoe.adapter.launch`."""

import contextlib
import os
import signal
import sys
from types import FrameType

from megatron_smartmoe.adapter.starting import starting

with starting():
    from megatron_smartmoe.adapter.launch.launcher import main


def _end(number: int, frame: FrameType | None) -> None:
    """Until the ranks are started: leave, and end what was started, such as the preparation of a corpus."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    # A thread of the watchdog may still look for the store of node 0, which has ended: torch's code aborts an ordinary
    # end then, and a run that is complete would count as failed.
    os._exit(status)
