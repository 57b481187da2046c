"""Flags of the pool: settings that training may switch between without a restart."""

from __future__ import annotations

import argparse

FLAG = "--smartmoe-pool"
INTERVAL_FLAG = "--smartmoe-pool-interval"
AUTO = "auto"


def add_pool_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags; called by `adapter.flags.parser`."""
    group.add_argument(
        FLAG,
        metavar="FILE|auto",
        default=None,
        help="With --smartmoe and expert parallelism: while training, switch among settings that need no restart, by "
        "predicted and measured step time. FILE: those of `smartmoe plan --pool` or of a plan.json. auto: what this "
        "launch allows: spare slots 0 to --smartmoe-spare-slots, copies by history, exact or off, homes that move or "
        "stay, and 1, 2, 4 or 8 pieces unless --smartmoe-overlap-degree is 1. The run starts with the setting that its "
        "other flags say. Default: no switching.",
    )
    group.add_argument(
        INTERVAL_FLAG,
        type=int,
        metavar="ITERATIONS",
        default=100,
        help="Iterations between two looks at the pool.",
    )
