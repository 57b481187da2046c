"""Relays: holders forward weights, and sum the gradients of those whom they feed; with faults in the messages."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_smartmoe.placement.relay import relay_tree
from tests.support.ranks import run_ranks, start_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

RANKS = 5
SLOTS = np.array([[0, -1], [1, 0], [2, 0], [3, 0], [4, 0]])  # everybody has a replica of expert 0: three rounds
SHAPE = (3, 4)


def _spare(dtype: str = "float32", *, keeps: bool = True, timeout_s: float = 60.0) -> tuple[Any, Any]:
    """This rank's spare slot and its home weight; the first call joins the ranks."""
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    home: Any = torch.nn.Parameter(random(rank, dtype))
    home.main_grad = torch.zeros_like(home, dtype=torch.float32)
    assert dist.group.WORLD is not None
    return SpareSlots([home], 1, ReplicaWire(dist.group.WORLD), lambda: [home.main_grad], keeps=keeps), home


def random(seed: int, dtype: str) -> Any:
    """`[1, 3, 4]`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def _iteration(spare: Any, home: Any, slots_RS: Any, gradient: Any) -> tuple[Any, Any]:
    """The weights that arrived, and the home's sum."""
    home.main_grad.zero_()
    spare.use(slots_RS, num_passes=1).start()
    spare.wire.advance()
    (weights,) = spare.weights()
    arrived = weights.detach().clone()
    (weights * gradient).sum().backward()
    spare.wire.advance()
    spare.finish_returns()
    return arrived, home.main_grad.clone()


def _relays() -> dict[str, list[tuple[Any, Any]]]:
    facts = {}
    for dtype in ("float32", "bfloat16"):
        for keeps in (True, False):
            spare, home = _spare(dtype, keeps=keeps)
            gradient = random(100 + spare.wire.rank, dtype)
            results = [_iteration(spare, home, SLOTS, gradient) for _ in range(2)]
            spare.wire._beside.at_once = True  # every round as soon as the one before it has arrived
            facts[f"{dtype}, {keeps}"] = [*results, _iteration(spare, home, SLOTS, gradient)]
    return facts


def sum_of(rank: int, dtype: str) -> Any:
    """What a rank sends to its parent, as `placement.relay` documents the order; of the home: what is added there."""
    import torch

    tree = relay_tree(SLOTS, 1)
    children = sorted(np.flatnonzero(tree.parent_RK[:, 0] == rank).tolist(), key=lambda child: -tree.round_RK[child, 0])
    total = random(100 + rank, dtype).float() if rank else torch.zeros(1, *SHAPE)
    for child in children:
        total = total + sum_of(child, dtype)
    return total


def test_weights_and_sums_are_relayed(tmp_path: Path) -> None:
    import torch

    assert relay_tree(SLOTS, 1).num_rounds == 3
    assert np.bincount(relay_tree(SLOTS, 1).parent_RK[1:, 0]).max() < RANKS - 1  # not the home alone
    for rank, facts in enumerate(run_ranks(_relays, RANKS, log_dir=tmp_path)):
        assert len(facts) == 4
        for case, results in facts.items():
            dtype = case.split(",")[0]
            for arrived, total in results:
                if rank:
                    assert torch.equal(arrived, random(0, dtype))
                    assert not total.any()
                else:
                    assert torch.equal(total, sum_of(0, dtype)), case


@contextmanager
def _posting(change: Any) -> Iterator[None]:
    """Post what `change` makes of each batch. Nobody waits for what it adds."""
    import torch.distributed as dist

    post = dist.batch_isend_irecv

    def changed(operations: list[Any]) -> list[Any]:
        posted = change(operations)
        return post(posted)[: len(operations)] if posted else []

    with mock.patch.object(dist, "batch_isend_irecv", changed):
        yield


def _twice(operations: list[Any]) -> list[Any]:
    return [*operations, *(each for each in operations if each.op.__name__ == "isend")]


def _late(operations: list[Any]) -> list[Any]:
    time.sleep(0.05 * (1 + int(os.environ["RANK"]) % 2))
    return operations


def _survived() -> dict[str, list[tuple[Any, Any]]]:
    """Iterations with messages that come late or twice, and one after an iteration that was broken off."""
    spare, home = _spare()
    gradient = random(100 + spare.wire.rank, "float32")
    facts = {}
    for name, change in (("late", _late), ("twice", _twice)):
        with _posting(change):
            facts[name] = [_iteration(spare, home, SLOTS, gradient) for _ in range(2)]
    # broken off once with the gradients under way, and once with the weights
    (weights,) = spare.use(SLOTS, num_passes=1).weights()
    weights.sum().backward()
    spare.wire.settle()
    spare.use(SLOTS, num_passes=1).start()
    spare.wire.settle()
    facts["broken off"] = [_iteration(spare, home, SLOTS, gradient)]
    return facts


def test_late_and_doubled_messages_change_nothing(tmp_path: Path) -> None:
    import torch

    for rank, facts in enumerate(run_ranks(_survived, RANKS, log_dir=tmp_path)):
        assert set(facts) == {"late", "twice", "broken off"}
        for name, results in facts.items():
            for arrived, total in results:
                if rank:
                    assert torch.equal(arrived, random(0, "float32")), name
                else:
                    assert torch.equal(total, sum_of(0, "float32")), name


def _loses(operations: list[Any]) -> list[Any]:
    sends = [each for each in operations if each.op.__name__ == "isend"]
    return [each for each in operations if each not in sends[:1]]


def _lost(direction: str) -> str:
    """The error of a rank when rank 1 does not send its first message."""
    spare, home = _spare(timeout_s=4.0)
    gradient = random(1, "float32")
    _iteration(spare, home, SLOTS, gradient)
    used = spare.use(SLOTS, num_passes=1)
    try:
        if direction == "gradients":
            (weights,) = used.weights()
        with _posting(_loses if spare.wire.rank == 1 else list):
            if direction == "weights":
                (weights,) = used.weights()
            weights.sum().backward()
            spare.finish_returns()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("direction", ["weights", "gradients"])
def test_a_lost_message_is_named(direction: str, tmp_path: Path) -> None:
    errors = run_ranks(_lost, RANKS, direction, log_dir=tmp_path)
    tree = relay_tree(SLOTS, 1)
    waits = int(np.flatnonzero(tree.parent_RK[:, 0] == 1)[0]) if direction == "weights" else int(tree.parent_RK[1, 0])
    assert errors[waits].startswith(f"{direction} of replicas: round ")
    assert "with rank" in errors[waits]
    assert "did not end: " in errors[waits]


def _dies(folder: Path) -> None:
    """Rank 1 ends between the fetch and the return; the others write down what they hear."""
    spare, _ = _spare()
    (weights,) = spare.use(SLOTS, num_passes=1).weights()
    if spare.wire.rank == 1:
        os._exit(7)
    try:
        weights.sum().backward()
        spare.finish_returns()
        text = ""
    except RuntimeError as error:
        text = str(error)
    (folder / f"error{spare.wire.rank}").write_text(text)
    os._exit(0)


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    ranks = start_ranks(_dies, RANKS, tmp_path, log_dir=tmp_path)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 7, 0, 0, 0]
    parent = int(relay_tree(SLOTS, 1).parent_RK[1, 0])
    error = (tmp_path / f"error{parent}").read_text()
    assert error.startswith("gradients of replicas: round ")
    assert "1" in error.partition("with rank")[2].partition(" did not end")[0]
