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


class Watched:
    """Ranks that are watched.

    Args:
        table: their records; None where nobody watches.
    """

    def __init__(self, table: ProgressTable | None) -> None:
        self._table = table

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables that the ranks need."""
        return {} if self._table is None else {VARIABLE: self._table.path}

    def place_of(self, rank: int) -> str | None:
        """Where a rank is, or was when it ended; None if that is not known."""
        records = [] if self._table is None else self._table.read()
        return next((record.place for record in records if record.rank == rank), None)


# From what prints a line to a context in which the ranks are watched.
Watch = Callable[[Callable[[str], object]], AbstractContextManager[Watched]]


def watch_node(topology: Topology, run_dir: Path) -> Watch:
    """What watches the ranks of this node, by itself or with the watchdogs of the job's other nodes."""

    @contextlib.contextmanager
    def watch(say: Callable[[str], object]) -> Iterator[Watched]:
        table = ProgressTable(topology.ranks_per_node)
        nodes = None
        if topology.num_nodes > 1:
            address = Address(host=topology.master_addr, port=topology.master_port)
            nodes = Nodes(address, node=topology.node, num_nodes=topology.num_nodes)
        with Watchdog(table, run_dir=run_dir, say=say, nodes=nodes):
            yield Watched(table)
        table.close()

    return watch


@contextlib.contextmanager
def no_watch(say: Callable[[str], object]) -> Iterator[Watched]:
    """Nothing is watched: what runs is no training."""
    yield Watched(None)
