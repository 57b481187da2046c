"""A shorter start: nobody looks for garbage while modules are imported.

Importing torch, Megatron and what they import makes a million objects that stay. Python looks through them for cycles
again and again meanwhile: a quarter of the CPU time of a start.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """While imports go on: no garbage collection. What is there then counts as permanent, and is not looked at."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
