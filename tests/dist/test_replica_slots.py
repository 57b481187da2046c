"""Weights reach their replicas; gradients reach their homes once and complete, before a hook reads the home's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

SLOTS = np.array([[0, 1, 2], [2, 3, 0]])  # two ranks, two home slots, one spare slot: each has a replica of the other's

OTHERS = np.array([[0, 1, 3], [2, 3, 1]])


def _setup(ranks: int = 2) -> tuple[Any, Any, list[Any]]:
    """This rank's spare slots, its home weights, and what a listener on their gradients saw."""
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    experts = torch.arange(2 * ranks * 6, dtype=torch.float32).view(2 * ranks, 2, 3)
    home: Any = torch.nn.Parameter(experts[2 * rank : 2 * rank + 2].clone())
    home.main_grad = torch.zeros_like(home)
    seen: list[Any] = []

    def listen(parameter: Any) -> None:  # what Megatron's DDP does
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        seen.append(parameter.main_grad.clone())

    home.register_post_accumulate_grad_hook(listen)
    assert dist.group.WORLD is not None
    spare = SpareSlots([home], 1, ReplicaWire(dist.group.WORLD), lambda: [home.main_grad], keeps=True)
    return spare, home, seen


def _passes(num_passes: int, keeps: bool, accumulates: bool) -> dict[str, Any]:
    import torch

    from megatron_smartmoe.adapter.moe import main_gradients
    from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear

    spare, home, seen = _setup()
    spare._accumulates = accumulates
    if not keeps:
        spare._keeps, spare._weights, spare._sums = False, None, None
    rank = spare.wire.rank
    copied: list[Any] = []
    if keeps:
        used = spare.use(SLOTS, num_passes=num_passes)
        used.start()
    for number in range(num_passes):
        if not keeps:
            spare.use(SLOTS, num_passes=1)
        (weights,) = spare.weights()
        copied.append(weights.detach().clone())
        # this rank's tokens: factor 1 + number at the homes, 10 x (1 + rank) at the replica
        loss, factor = (home * (1 + number)).sum(), 10 * (1 + rank)
        if accumulates:  # the gradient of all ones, added to the sums by who computes it
            ones = torch.ones(1, 3)
            groups = Groups.of(ones, torch.tensor([1]))
            loss = loss + (grouped_linear(ones, weights, groups, main_gradients.add) * factor).sum()
        else:
            loss = loss + (weights * factor).sum()
        loss.backward()
    spare.finish_returns()  # before the home's gradient is reduced
    return {
        "copied": torch.stack(copied),
        "total": home.main_grad,
        "seen": seen,
        "bytes": spare.nbytes,
        "in use": spare.in_use is not None,
    }


@pytest.mark.parametrize(
    ("num_passes", "keeps", "accumulates"),
    [(1, True, False), (3, True, False), (3, True, True), (1, False, False), (2, False, False)],
)
def test_weights_go_out_and_gradients_come_home(
    num_passes: int, keeps: bool, accumulates: bool, tmp_path: Path
) -> None:
    ranks = run_ranks(_passes, 2, num_passes, keeps, accumulates, log_dir=tmp_path)
    experts = np.arange(24.0).reshape(4, 2, 3)
    at_home = sum(1 + number for number in range(num_passes))
    for rank, (result, replica_expert, gave) in enumerate(zip(ranks, (2, 0), (0, 2), strict=True)):
        assert (result["copied"].numpy() == experts[[replica_expert]]).all()
        from_replica = 10 * (2 - rank) * num_passes  # the other rank's factor
        expected = np.full((2, 2, 3), float(at_home))
        expected[gave - 2 * rank] += from_replica
        assert (result["total"].numpy() == expected).all()
        if num_passes == 1:  # nothing was waited for in the backward pass
            assert (result["seen"][-1].numpy() == at_home).all()
        assert len(result["seen"]) == num_passes
        assert result["in use"] == keeps
        one = 6 * 4  # elements, bytes of a float
        assert result["bytes"] == (2 * one if keeps else 0)


def _packed() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())
    weight: Any = torch.nn.Parameter(torch.randn(2, 130, 200, generator=generator).bfloat16())
    bias: Any = torch.nn.Parameter(torch.randn(2, 130, generator=generator).bfloat16())
    for home in (weight, bias):
        home.main_grad = torch.zeros_like(home, dtype=torch.float32)
    assert dist.group.WORLD is not None
    wire = ReplicaWire(dist.group.WORLD)
    sent, operation = list[Any](), wire._operation

    def noted(kind: Any, data: Any, *rest: Any) -> Any:
        sent.append((kind.__name__, data.dtype, tuple(data.shape)))
        return operation(kind, data, *rest)

    wire._operation = noted  # type: ignore[method-assign, assignment]
    totals = [weight.main_grad, bias.main_grad]
    spare = SpareSlots([weight, bias], 1, wire, lambda: totals, keeps=True, packs=True)
    spare.use(SLOTS, num_passes=2)
    for _ in range(2):
        weights, biases = spare.weights()
        (weights.float().sum() + biases.float().sum()).backward()
    spare.finish_returns()
    return {
        "homes": [weight.detach(), bias.detach()],
        "copied": [weights.detach().clone(), biases.detach().clone()],
        "sent": sent,
        "total": [total[:, 0].sum().item() for total in totals],
    }


def test_weights_travel_as_fp8_and_gradients_as_they_are(tmp_path: Path) -> None:
    import torch

    from megatron_smartmoe.runtime.replicas.fp8_blocks import dequantize, message_bytes, quantize

    ranks = run_ranks(_packed, 2, log_dir=tmp_path)
    for this, other in (ranks, reversed(ranks)):
        weight, bias = this["copied"]
        assert torch.equal(weight[0], dequantize(*quantize(other["homes"][0][0])))
        assert not torch.equal(weight[0], other["homes"][0][0])
        assert torch.equal(bias[0], other["homes"][1][0])
        assert this["sent"][:4].count(("isend", torch.uint8, (message_bytes(130, 200),))) == 1
        assert this["sent"][:4].count(("isend", torch.bfloat16, (130,))) == 1
        assert {dtype for _, dtype, _ in this["sent"][4:]} == {torch.float32}
        assert this["total"] == [400.0, 2.0]  # of two passes, sent home once


def _planned_anew(once: list[int]) -> dict[str, Any]:
    """Two iterations of three passes, in some of which other replicas are used once."""
    import torch

    spare, home, _ = _setup()
    rank, copied = spare.wire.rank, list[Any]()
    for _ in range(2):
        home.main_grad.zero_()
        spare.use(SLOTS, num_passes=3).start()
        for number in range(3):
            if number in once:
                spare.use_once(OTHERS).start()
            (weights,) = spare.weights()
            copied.append(weights.detach()[0, 0, 0].clone())
            (home.sum() + (weights * 10 * (1 + rank)).sum()).backward()
        spare.finish_returns()
    return {"copied": torch.stack(copied).tolist(), "total": home.main_grad[:, 0, 0].tolist()}


@pytest.mark.parametrize("once", [[1], [0, 2], [0, 1, 2]], ids=str)
def test_other_replicas_serve_a_micro_batch(once: list[int], tmp_path: Path) -> None:
    """Those of the iteration serve the other passes, and their gradients come home once, without stale ones."""
    ranks = run_ranks(_planned_anew, 2, once, log_dir=tmp_path)
    replicas = [
        [3 if number in once else 2 for number in range(3)],
        [1 if number in once else 0 for number in range(3)],
    ]
    for rank, result in enumerate(ranks):
        assert result["copied"] == [6.0 * expert for expert in replicas[rank] * 2]
        factor = 10.0 * (2 - rank)  # the other rank's, which has replicas of this one's experts
        assert result["total"] == [3.0 + factor * (3 - len(once)), 3.0 + factor * len(once)]


def _modes() -> list[bool]:
    """Whether two sets of replicas in a row share their memory: kept, for a micro-batch each, and kept again."""
    spare, _, _ = _setup()
    before, shared = spare.nbytes, []
    for keeps in (True, False, True):
        spare.keep(keeps)
        assert spare.in_use is None
        first, second = (spare.use(SLOTS, num_passes=1) for _ in range(2))
        shared.append(first.spares[0].data_ptr() == second.spares[0].data_ptr())
        assert spare.nbytes == before
    return shared


def test_the_mode_changes_and_the_memory_stays(tmp_path: Path) -> None:
    """Replicas of micro-batches that are in flight at the same time must not overwrite each other."""
    assert run_ranks(_modes, 2, log_dir=tmp_path) == [[True, False, True]] * 2


def _again() -> Any:
    """An iteration that is run again from zeroed gradients, as Megatron does when it looks for silent faults."""
    spare, home, _ = _setup()
    spare.use(SLOTS, num_passes=2).start()
    for _ in range(2):
        home.main_grad.zero_()
        for _ in range(2):
            (weights,) = spare.weights()
            (home.sum() + weights.sum()).backward()
        spare.finish_returns()
    return home.main_grad


def test_an_iteration_can_be_run_again(tmp_path: Path) -> None:
    first, second = run_ranks(_again, 2, log_dir=tmp_path)
    assert first[0].unique().tolist() == [4.0]  # the expert with a replica: two passes at home, two at the replica
    assert first[1].unique().tolist() == [2.0]
    assert second[0].unique().tolist() == [4.0]


def _fetches_that_nobody_asks_for() -> dict[str, tuple[bool, float]]:
    """After each way to change the replicas in use: whether the fetch before it has ended, and what it brought."""
    from megatron_smartmoe.runtime.replicas.layer_planner import LayerPlanner

    spare, _, _ = _setup()
    none = np.where(np.arange(3) < 2, SLOTS, -1)
    planner: Any = SimpleNamespace(_spare=spare, _homes_RS=none)
    changes: dict[str, Callable[[], object]] = {
        "other replicas": lambda: spare.use(SLOTS, num_passes=1),
        "none": lambda: spare.use(none, num_passes=1),
        "for a micro-batch": lambda: spare.keep(False),
        "for an iteration": lambda: spare.keep(True),
        "another planner": lambda: LayerPlanner.plan_with(planner, None),
    }
    facts = {}
    for name, change in changes.items():
        spare.keep(True)
        used = spare.use(SLOTS, num_passes=1)
        used.spares[0].zero_()
        if spare.wire.rank == 1:  # rank 0 has started to fetch for a while when rank 1 begins to send
            time.sleep(0.2)
        used.start()
        change()
        facts[name] = used._fetch.is_finished, float(used.spares[0].sum())
    return facts


def test_a_fetch_that_nobody_asks_for_is_waited_for(tmp_path: Path) -> None:
    """Its messages would otherwise arrive in memory that is in use for something else."""
    for facts, expert in zip(run_ranks(_fetches_that_nobody_asks_for, 2, log_dir=tmp_path), (2, 0), strict=True):
        brought = float(np.arange(24.0).reshape(4, 6)[expert].sum())
        assert facts == dict.fromkeys(facts, (True, brought))
        assert len(facts) == 5


def _digests() -> tuple[bool, bool]:
    import torch.distributed as dist

    spare, _, _ = _setup()
    return spare.wire.is_equal_on_all_ranks("0123456789abcdef"), spare.wire.is_equal_on_all_ranks(
        f"{dist.get_rank()}123456789abcdef"
    )


def test_ranks_notice_that_they_disagree(tmp_path: Path) -> None:
    assert run_ranks(_digests, 2, log_dir=tmp_path) == [(True, False), (True, False)]


THREE_RANKS = np.array([[0, 1, -1], [2, 3, -1], [4, 5, 0]])  # rank 2 has a replica of rank 0's expert, rank 1 has none


def _first_operation() -> tuple[float, str]:
    """The sum of a replica that is fetched before anything else, and the error of the same batch in a new group."""
    import torch
    import torch.distributed as dist

    from tests.support.ready_groups import UnreadyGroup

    spare, _, _ = _setup(3)
    spare.use(THREE_RANKS, num_passes=1)
    (weights,) = spare.weights()
    rank, group, problem = dist.get_rank(), dist.new_group(), ""
    if rank != 1:  # the batch that a fetch posts, without the collective of the whole group before it
        kind = dist.isend if rank == 0 else dist.irecv
        try:
            dist.batch_isend_irecv([dist.P2POp(kind, torch.zeros(1), 2 - rank, group)])
        except UnreadyGroup as error:
            problem = str(error)
    return float(weights.detach().sum()), problem


def test_the_first_operation_of_a_group_is_one_of_all_its_ranks(tmp_path: Path) -> None:
    """Otherwise NCCL waits for rank 1, which has nothing to send or receive."""
    fetched, problems = zip(*run_ranks(_first_operation, 3, log_dir=tmp_path), strict=True)
    assert fetched == (0.0, 0.0, float(sum(range(6))))
    assert problems[1] == ""
    for rank in (0, 2):
        assert problems[rank] == (
            f"rank {rank}: batch_isend_irecv of 1 is the first operation of a group of 3 ranks: NCCL waits for the "
            "others for ever. Run a collective of the whole group first, for example an all_reduce of one element."
        )
