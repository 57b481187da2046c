"""The functions that a tool plans replicas with: the compiled ones where that is worth loading torch, else numpy's."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from megatron_smartmoe.placement.kernels import NUMPY, Kernels

# Imported by name: the tools run without torch, which alone takes a second or two to load. Plans of that many ranks
# take numpy longer than that: 1 to 20 ms each, by the number of ranks.
_MODULE = "megatron_smartmoe.runtime.replicas.kernels"
WORTH_LOADING = 50_000


def kernels_for(plans: int, num_ranks: int) -> Kernels:
    """The fastest functions for this many plans of a layer; all find the same plans.

    Args:
        plans: of one layer each.
        num_ranks: ranks of an expert-parallel group.
    """
    if plans * num_ranks < WORTH_LOADING:
        return NUMPY
    found = NUMPY
    if importlib.util.find_spec("torch") is not None:
        found = importlib.import_module(_MODULE).fastest_kernels()
    if found is NUMPY:
        rule = f"planning {plans:,} layers with numpy, which takes 3 to 20 times as long as the compiled library"
        print(f"note: {rule}. Install torch and build it: scripts/setup.sh.", file=sys.stderr)
    return found
