"""Runs with copies of experts, and with faults in how their gradients go home."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from megatron_smartmoe.simulate.run import PolicyResult
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


def train_with_stock_all_to_all(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int
) -> list[float]:
    """Do what `training.train` does, with Megatron's all-to-all where this project's would stand for it."""
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags]
    run_ranks(
        _with_stock_all_to_all, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], log_dir=run_dir / "ranks"
    )
    return losses(run_dir)


def _with_stock_all_to_all(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
    from megatron_smartmoe.adapter.pretrain import main

    with mock.patch.object(SmartMoELayer, "_has_own_all_to_all", return_value=False):
        main(argv)


def balance(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of balance-stage0-group0.jsonl: the first expert-parallel group of the first stage."""
    return [json.loads(line) for line in (run_dir / "balance-stage0-group0.jsonl").read_text().splitlines()]


def distance(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    assert len(losses) == len(expected) > 0
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


def simulated(
    trace_file: Path,
    *,
    num_ranks: int,
    spare_slots: int = 1,
    replicas: Literal["history", "auto"] = "auto",
    priced_as: Path | None = None,
) -> tuple[PolicyResult, list[str]]:
    """A trace replayed by the policy of training, and the lines of its decisions.

    Args:
        trace_file: of one expert-parallel group.
        num_ranks: of the group.
        spare_slots: of a rank.
        replicas: what they are planned from.
        priced_as: directory of the run, for its prices; None for free transfers.
    """
    from megatron_smartmoe.cost.moe_layer import LayerConstants
    from megatron_smartmoe.placement.online_options import OnlineOptions
    from megatron_smartmoe.runtime.decisions.record import read_starts
    from megatron_smartmoe.simulate.policies import OnlinePolicy
    from megatron_smartmoe.simulate.run import SimulationSetup, replay
    from megatron_smartmoe.spec.placement import Placement
    from megatron_smartmoe.spec.trace import load_trace

    trace = load_trace(trace_file)
    layers, experts = len(trace.layer), trace.num_experts
    placement = Placement.contiguous(
        num_layers=layers, num_experts=experts, num_ranks=num_ranks, spare_slots=spare_slots
    )
    priced = OnlineOptions()
    if priced_as is not None:
        recorded = read_starts(priced_as)[0].replicas
        assert recorded is not None
        priced = OnlineOptions(replica=recorded.online.replica, exact_price=recorded.exact_price)
    options = replace(priced, homes_interval=0, replicas=replicas)
    policy = OnlinePolicy(placement, 1, options, lambda slots_RS, counts_RE: 0.0)
    setting = SimulationSetup(
        num_ranks=num_ranks, spare_slots=spare_slots, warmup=0, constants=LayerConstants(token_s=1.0), state_bytes=0
    )
    return replay(trace, policy, setting), [decision.to_line() for decision in policy.decisions]


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
