"""Flags of the replicas: copies of hot experts in spare slots."""

from __future__ import annotations

import argparse

REPLICAS = ("off", "history", "exact")
SCOPES = ("node", "group")


def add_replica_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags; called by `adapter.flags.parser`."""
    group.add_argument(
        "--smartmoe-spare-slots",
        type=int,
        metavar="K",
        default=0,
        help="Slots of each rank and layer for copies of other ranks' experts. A slot takes the memory of one expert's "
        "weights and float32 gradients, and no optimizer state. Default: 0.",
    )
    group.add_argument(
        "--smartmoe-replicas",
        choices=REPLICAS,
        default=None,
        help="What the spare slots hold. history: copies planned from earlier iterations, fetched once an iteration. "
        "exact: copies planned from each micro-batch's own counts. off: nothing. Default: history with spare slots.",
    )
    group.add_argument(
        "--smartmoe-replicas-scope",
        choices=SCOPES,
        default="node",
        help="node: a copy stays on the node of its expert's home. group: it may lie anywhere in the expert-parallel "
        "group.",
    )
    group.add_argument(
        "--smartmoe-replicas-margin",
        type=float,
        default=1.0,
        help="A layer makes copies when what they spare its busiest rank is worth this many times their way there and "
        "back, by the cost model of --smartmoe-cluster. 0: whenever they improve the balance.",
    )


def replicas_mode(args: argparse.Namespace) -> str:
    """The mode in force: one of REPLICAS."""
    if args.smartmoe_spare_slots == 0:
        return "off"
    return args.smartmoe_replicas or "history"
