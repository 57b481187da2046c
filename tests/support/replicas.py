"""Runs with copies of experts, and with faults in how their gradients go home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

ALWAYS = ("--smartmoe", "--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "0")


def train_with_fault(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int, fault: str
) -> list[float]:
    """Do what `training.train` does, with one of `FAULTS` in the return of the copies' gradients, or `AT_ONCE`."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(_main, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], fault, log_dir=run_dir / "ranks")
    return losses(run_dir)


def balance(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of balance-stage0-group0.jsonl: the first expert-parallel group of the first stage."""
    return [json.loads(line) for line in (run_dir / "balance-stage0-group0.jsonl").read_text().splitlines()]


def _dropped(start: Any, links: Any, gradients: Any, *rest: Any) -> Any:
    return start(links[:-1], gradients, *rest)


def _twice(start: Any, links: Any, gradients: Any, *rest: Any) -> Any:
    start(links[:1], gradients, *rest).finish()
    return start(links, gradients, *rest)


def _wrong_home(start: Any, links: Any, gradients: Any, *rest: Any) -> Any:
    first, *others = links
    other = (first.parent_slot + 1) % 4  # of 8 experts on 2 ranks
    return start([first._replace(parent_slot=other), *others], gradients, *rest)


def _at_once(start: Any, *args: Any) -> Any:
    """No fault: every round is waited for where the return starts."""
    transfer = start(*args)
    while not transfer.is_posted:
        transfer.advance()
    return transfer


AT_ONCE = "waited for"
FAULTS = {
    "dropped": _dropped,
    "counted twice": _twice,
    "returned to the wrong home": _wrong_home,
}


def _main(argv: list[str], fault: str) -> None:
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    start = ReplicaWire.start_return

    def faulty(wire: Any, links: Any, *rest: Any) -> Any:
        return (FAULTS | {AT_ONCE: _at_once})[fault](lambda *args: start(wire, *args), tuple(links), *rest)

    with mock.patch.object(ReplicaWire, "start_return", faulty):
        main(argv)
