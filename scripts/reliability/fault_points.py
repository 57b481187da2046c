"""Inside a rank: wait for a point of the training, and do there what the fault says.

Nothing of this is in the product. Named functions are wrapped from outside, and a `Callback` stands at the moments of
Megatron's loop that have one; a function that no longer exists fails the run by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.reliability import fault_link

# Where a fault can strike: `module:name` of the function that is wrapped; the fault comes when it is called.
FUNCTIONS = {
    "counting": "megatron_smartmoe.runtime.counts:IntervalCounts.start_reduction",
    "planning homes": "megatron_smartmoe.runtime.controller:Controller._propose_and_judge",
    "planning replicas": "megatron_smartmoe.adapter.loops.replicas:ReplicaLoop.before_step",
    "replica fetch": "megatron_smartmoe.runtime.replicas.wire:ReplicaWire.start_fetch",
    "gradient return": "megatron_smartmoe.runtime.replicas.wire:ReplicaWire.start_return",
    "split": "megatron_smartmoe.runtime.replicas.dispatch_plan:DispatchPlanner.plan",
    "optimizer step": "megatron.core.optimizer.optimizer:ChainedOptimizer.step",
    "save: shards": (
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.retrieve_write_results"
    ),
    "save: index": "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
    "save: digests": "megatron_smartmoe.adapter.checkpoint.digests:LocalDigests.compute",
    "save: checksums": "megatron_smartmoe.adapter.checkpoint.finishing:own_entries",
    "save: manifest": "megatron_smartmoe.adapter.checkpoint.finishing:write_manifest",
    "save: tracker": "megatron_smartmoe.adapter.checkpoint.finishing:write_tracker",
}
MIGRATION = {f"migration: {point}": point for point in ("received", "staged", "agreed", "committed")}
MOMENTS = ("start", "save: begin", "save: end", "evaluation", "end")  # of a Callback
ON_RANK_0 = ("save: index", "save: manifest", "save: tracker")  # what that rank alone does
POINTS = (*FUNCTIONS, *MIGRATION, *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a rank is told.

    Attributes:
        action: a name of `ACTIONS`.
        point: a name of `POINTS`.
        victim: the rank that does it.
        iteration: the first training iteration in which the point counts.
        seconds: how long, for actions that last.
        mount: a file system of its own that holds the run directory; empty if there is none.
        marker: a file that is written when the fault strikes, with the time and the iteration.
    """

    action: str
    point: str
    victim: int
    iteration: int
    seconds: float
    mount: str
    marker: str


def install(order: Order) -> Any:
    """Wrap what the order needs; returns a Callback for Megatron's loop. Called before the training is set up."""
    from megatron_smartmoe.adapter.hooks import Callback

    trap = _Trap(order)
    if order.point in FUNCTIONS:
        _wrap(FUNCTIONS[order.point], trap.spring)
    elif order.point in MIGRATION:
        _probe_migration(trap, MIGRATION[order.point])
    if order.action == "refuse memory":
        _refuse_memory(trap)

    class Moments(Callback):
        def on_start(self, run: Any) -> None:
            trap.iteration = run.args.iteration
            trap.at("start")

        def before_step(self, iteration: int) -> None:
            trap.iteration = iteration

        @contextlib.contextmanager
        def around_save(self, iteration: int) -> Iterator[None]:
            trap.at("save: begin")
            yield
            trap.at("save: end")

        def after_evaluation(self, split: str, losses: Any) -> None:
            trap.at("evaluation")

        def on_end(self) -> None:
            trap.at("end")

    return Moments()


class _Trap:
    """Strikes once, on one rank, from a given iteration on."""

    def __init__(self, order: Order) -> None:
        self.order, self.iteration, self.struck = order, 0, False
        self._is_victim = int(os.environ["RANK"]) == order.victim

    def at(self, point: str) -> None:
        """Strike if this is the point."""
        if point == self.order.point:
            self.spring()

    def spring(self) -> None:
        """Strike if the iteration has come; at the start and the end of a run whatever the iteration."""
        due = self.iteration >= self.order.iteration or self.order.point in ("start", "end")
        if self._is_victim and due and not self.struck:
            self.struck = True
            Path(self.order.marker).write_text(f"{time.time()} {self.iteration} {os.getpid()}\n", encoding="utf-8")
            ACTIONS[self.order.action](self.order)


def holder_of(where: str) -> tuple[Any, str]:
    """The module or class that has a function, and its name there.

    Args:
        where: `module:Class.method` or `module:function`.
    """
    module, _, path = where.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        holder = getattr(holder, each)
    return holder, name


def _wrap(where: str, before: Callable[[], None]) -> None:
    """Call `before` ahead of a function; see `holder_of`."""
    holder, name = holder_of(where)
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    setattr(holder, name, wrapped)


def _probe_migration(trap: _Trap, wanted: str) -> None:
    """Use the probe that the exchange has for tests: it is called in every round of a migration."""
    from megatron_smartmoe.runtime.migration.exchange import ExpertExchange

    made = ExpertExchange.__init__

    def probe(point: str, step: Any, chunk: Any) -> None:
        if point == wanted:
            trap.spring()

    ExpertExchange.__init__ = lambda self, **kwargs: made(self, **kwargs, probe=probe)  # type: ignore[method-assign]


def _refuse_memory(trap: _Trap) -> None:
    """Let the allocator refuse the staging memory of one migration."""
    from megatron_smartmoe.runtime.migration import staging

    take = staging.Arena.take

    def refusing(arena: Any, nbytes: int) -> Any:
        import torch

        empty = torch.empty

        def refused(*args: Any, **kwargs: Any) -> Any:
            trap.spring()
            torch.empty = empty
            if trap.struck:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: the fault refuses it")
            return empty(*args, **kwargs)

        if not trap.struck and trap._is_victim and trap.iteration >= trap.order.iteration:
            arena._bytes = None  # as if the plan were larger than all before it
            torch.empty = refused
        try:
            return take(arena, nbytes)
        finally:
            torch.empty = empty

    staging.Arena.take = refusing  # type: ignore[method-assign, assignment]


def _kill(order: Order) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _pause(order: Order) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)  # the harness continues it


def _sleep(order: Order) -> None:
    time.sleep(order.seconds)


def _fill_disk(order: Order) -> None:
    """Fill the run's file system to the last byte."""
    with contextlib.suppress(OSError), (Path(order.mount) / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), (Path(order.mount) / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(b"0")


def _make_read_only(order: Order) -> None:
    subprocess.run(["mount", "-o", "remount,ro", order.mount], check=False, capture_output=True)


def _cut(order: Order) -> None:
    fault_link.cut()


def _nothing(order: Order) -> None:
    """For a fault that something else brings about."""


ACTIONS: dict[str, Callable[[Order], None]] = {
    "kill": _kill,
    "pause": _pause,
    "long pause": _pause,
    "slow": _sleep,
    "disk full": _fill_disk,
    "read-only": _make_read_only,
    "refuse memory": _nothing,
    "cut the link": _cut,
}
