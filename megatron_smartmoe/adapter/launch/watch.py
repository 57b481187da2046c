"""The launcher's part of the watchdog: it holds the records of this node's ranks, and watches them while they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.runtime.progress import VARIABLE, ProgressTable
from megatron_smartmoe.runtime.watchdog.nodes import Address, Nodes
from megatron_smartmoe.runtime.watchdog.watch import Watchdog

# From what prints a line to a context, in which the ranks are watched and have these environment variables.
Watch = Callable[[Callable[[str], object]], AbstractContextManager[Mapping[str, str]]]


def watch_node(topology: Topology, run_dir: Path) -> Watch:
    """What watches the ranks of this node, by itself or with the watchdogs of the job's other nodes."""

    @contextlib.contextmanager
    def watch(say: Callable[[str], object]) -> Iterator[Mapping[str, str]]:
        table = ProgressTable(topology.ranks_per_node)
        nodes = None
        if topology.num_nodes > 1:
            address = Address(host=topology.master_addr, port=topology.master_port)
            nodes = Nodes(address, node=topology.node, num_nodes=topology.num_nodes)
        with Watchdog(table, run_dir=run_dir, say=say, nodes=nodes):
            yield {VARIABLE: table.path}
        table.close()

    return watch


@contextlib.contextmanager
def no_watch(say: Callable[[str], object]) -> Iterator[Mapping[str, str]]:
    """Nothing is watched: what runs is no training."""
    yield {}
