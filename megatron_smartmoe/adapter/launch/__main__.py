"""`python -m megatron_smartmoe.adapter.launch`."""

import signal
import sys
from types import FrameType

from megatron_smartmoe.adapter.launch.launcher import main


def _end(number: int, frame: FrameType | None) -> None:
    """Until the ranks are started: leave, and end what was started, such as the preparation of a corpus."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.exit(main())
