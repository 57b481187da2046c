"""What several ranks do under `one_gpu`: on CPU tensors in every run of the suite, on cuda:0 where there is one.

Each function is one rank's part of a job that starts its process groups itself, and returns plain values that the tests
judge, in `tests/dist/test_one_gpu.py` and `tests/gpu/test_ranks_on_one_gpu.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_smartmoe.cost.fitted import Part, StepRecord
from megatron_smartmoe.report.account import read_steps
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

WITHOUT_REPLICA = 1  # the rank that neither has a replica nor the home of one
RANKS = 5
# ranks 2 to 4 have a replica of rank 0's expert 0: rank 0 feeds two of them, and one of them the third
SLOTS = np.array([[0, 1, -1], [2, 3, -1], [4, 5, 0], [6, 7, 0], [8, 9, 0]])
LATE_S = 0.05  # how late operations are where the tests look for what a missing wait does


def _join(device: str, delay_s: float | None = None) -> Any:
    """Form the process group of all ranks, under `one_gpu`."""
    import torch
    import torch.distributed as dist

    from tests.support import one_gpu

    if delay_s is not None:
        one_gpu.DELAY_S = delay_s
    one_gpu.install()
    if device != "cpu":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl")  # as the product asks for it
    return dist


def semantics(device: str) -> dict[str, Any]:
    """How operations behave: late, in order, with their errors where they are waited for."""
    import torch

    dist = _join(device, LATE_S)
    rank, size = dist.get_rank(), dist.get_world_size()
    facts: dict[str, Any] = {}
    # Step 1: what is written holds nothing before the wait
    gathered = torch.zeros(size, device=device)
    work = dist.all_gather_into_tensor(gathered, torch.full((1,), rank + 1.0, device=device), async_op=True)
    facts["before the wait"] = gathered.tolist()
    work.wait()
    facts["after the wait"] = gathered.tolist()
    # Step 2: an input that is overwritten before the wait is read late
    sent = torch.full((1,), 1.0, device=device)
    work = dist.all_reduce(sent, async_op=True)
    if device == "cpu":  # on a GPU this would run behind the posting, and NCCL reads beside it
        sent.fill_(100.0)
    work.wait()
    facts["overwritten"] = float(sent)
    # Step 3: operations of a group run in the order of posting; two groups do not wait for each other
    other = dist.new_group()
    values = [torch.full((1,), float(number), device=device) for number in range(4)]
    groups = [None, other] * 2
    works = [dist.all_reduce(v, group=group, async_op=True) for v, group in zip(values, groups, strict=True)]
    for work in works:
        work.wait()
    facts["sums"] = [float(value) for value in values]
    # Step 4: one handle for what is coalesced
    shard, whole = torch.zeros(1, device=device), torch.arange(float(size), device=device)
    with dist._coalescing_manager(other, async_ops=True) as manager:
        dist.reduce_scatter_tensor(shard, whole, group=other, async_op=True)
    manager.wait()
    facts["coalesced"] = float(shard)
    # Step 5: a batch is no group's first operation
    fresh, facts["refused"] = dist.new_group(), ""
    if rank != WITHOUT_REPLICA:
        kind, value = (dist.isend, values[0]) if rank == 0 else (dist.irecv, values[1])
        try:
            dist.batch_isend_irecv([dist.P2POp(kind, value, 2 - rank, fresh)])
        except AssertionError as error:
            facts["refused"] = str(error)
    # Step 6: a size that does not fit is an error of the operation, raised where it is waited for
    work = dist.all_to_all_single(torch.zeros(3, device=device), values[0], async_op=True)
    with contextlib.suppress(RuntimeError):
        work.wait()
        facts["no error"] = True
    return facts


def replicas(device: str, fault: str = "") -> dict[str, Any]:
    """The first thing that a run with replicas does: a fetch in which one rank has no part, and the way back.

    Args:
        device: of the tensors.
        fault: "no wait" to use what has not arrived.
    """
    import torch

    dist = _join(device, LATE_S)
    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire
    from tests.support import one_gpu

    rank = dist.get_rank()
    home: Any = torch.nn.Parameter(torch.arange(12.0, device=device).view(2, 2, 3) + 100 * rank)
    home.main_grad = torch.zeros_like(home)
    spare = SpareSlots([home], 1, ReplicaWire(dist.new_group()), lambda: [home.main_grad], keeps=False)
    used = spare.use(SLOTS, num_passes=1)
    assert used is not None
    if fault:
        mock.patch.object(one_gpu.Work, "wait", return_value=True).start()
    used.start()
    (weights,) = spare.weights()
    copied = weights.detach().clone()
    (home.sum() + 10 * weights.sum()).backward()
    spare.finish_returns()
    return {
        "copied": copied.tolist(),
        "returned": home.main_grad.tolist(),
        "agree": spare.wire.is_equal_on_all_ranks("0123456789abcdef"),
        "differ": not spare.wire.is_equal_on_all_ranks(f"{rank}123456789abcdef"),
    }


def rows(device: str, fault: str = "") -> dict[str, Any]:
    """One exchange of rows, forward and backward; rank r sends r + 1 rows of r to each rank.

    Args:
        device: Of the rows.
        fault: `no wait`: as if the exchange did not wait.
    """
    import torch

    dist = _join(device, LATE_S)
    from megatron_smartmoe.runtime.chunked_all_to_all import RowExchange

    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = RowExchange(dist.group.WORLD, [rank + 1] * size, [source + 1 for source in range(size)])
    sent = torch.full(((rank + 1) * size, 4), rank + 1.0, device=device, requires_grad=True)
    with mock.patch("tests.support.one_gpu.Work.wait") if fault else contextlib.nullcontext():
        with torch.no_grad() if fault else contextlib.nullcontext():
            (arrived,) = exchange.finish(*exchange.start(sent))
            column = arrived[:, 0].clone()
        if not fault:
            arrived.square().sum().backward()
    dist.barrier()  # without a wait, a rank could end before the others have connected to it
    return {"arrived": column.tolist(), "gradient": None if sent.grad is None else sent.grad.unique().tolist()}


def migration(device: str, *, distributed: bool) -> dict[str, Any]:
    """A job of experts whose homes change between its steps, and a twin of it whose homes stay."""
    _join(device)
    from tests.support.experts import Job, Mix

    mix = Mix(ep=2, edp=2 if distributed else 1, bf16=True, distributed=distributed, overlap=distributed)
    job, twin = (Job(mix, device=device) for _ in range(2))
    exchange = job.exchange()
    for each in (job, twin):
        each.step()
    before, addresses = job.fingerprints(), [weight.data_ptr() for weight in job.ddp.parameters()]
    _, report = job.migrate(job.random_homes(1), exchange)
    unchanged = job.fingerprints() == before
    for each in (job, twin):
        each.step()
    return {
        "sent": report.sent_bytes,
        "unchanged by the move": unchanged,
        "in place": addresses == [weight.data_ptr() for weight in job.ddp.parameters()],
        "as if nothing had moved": job.fingerprints() == twin.fingerprints(),
        "main weights agree": job.main_weights_agree(),
    }


def check_semantics(results: Sequence[dict[str, Any]], device: str) -> None:
    """Judge what the ranks of `semantics` returned."""
    for rank, facts in enumerate(results):
        assert facts["before the wait"] == [0, 0, 0]
        assert facts["after the wait"] == [1, 2, 3]
        assert facts["overwritten"] == (300 if device == "cpu" else 3)
        assert facts["sums"] == [0, 3, 6, 9]
        assert facts["coalesced"] == 3 * rank
        refused = f"rank {rank}: batch_isend_irecv of 1 is the first operation of a group of 3 ranks"
        assert facts["refused"].startswith(refused if rank != WITHOUT_REPLICA else "")
        assert "no error" not in facts


def check_replicas(results: Sequence[dict[str, Any]]) -> None:
    """Judge what the ranks of `replicas` returned."""
    zeros, tens = np.zeros((2, 3)), np.full((2, 3), 10.0)
    for rank, result in enumerate(results):
        copied = np.arange(6.0).reshape(2, 3) if rank >= 2 else zeros
        assert np.array_equal(result["copied"], [copied])
        # the replicas' gradients; the home's own is not in the sum here, Megatron's hook adds it
        assert np.array_equal(result["returned"], [3 * tens if rank == 0 else zeros, zeros])
        assert result["agree"]
        assert result["differ"]


def check_rows(results: Sequence[dict[str, Any]]) -> None:
    """Judge what the ranks of `rows` returned."""
    expected = [source + 1.0 for source in range(len(results)) for _ in range(source + 1)]
    for rank, result in enumerate(results):
        assert result["arrived"] == expected
        assert result["gradient"] == [2.0 * (rank + 1)]


def check_migration(results: Sequence[dict[str, Any]]) -> None:
    """Judge what the ranks of `migration` returned."""
    assert sum(result["sent"] for result in results) > 0
    for result in results:
        assert result["unchanged by the move"]
        assert result["in place"]  # a CUDA graph holds addresses
        assert result["as if nothing had moved"]
        assert result["main weights agree"]


def _train(argv: Sequence[str], device: str) -> None:
    """Train as `torchrun -m megatron_smartmoe.adapter.pretrain` does, with every rank on the one device."""
    from megatron_smartmoe.adapter.pretrain import main
    from tests.support import cuda_events, one_gpu

    one_gpu.install()
    if device == "cpu":
        cuda_events.time_steps_with_events()
    main([*argv, "--smartmoe-device", "cuda" if device != "cpu" else "cpu"])


ALWAYS_REPLICAS = "--smartmoe-spare-slots 1 --smartmoe-replicas-margin 0 --smartmoe-replicas"
MOVES = "--smartmoe-homes shuffle --smartmoe-homes-interval 1"
TRAININGS = {  # name -> flags; all with the experts of --smartmoe
    "nothing moves": "--smartmoe-homes off",
    "shuffled homes": MOVES,
    "replicas from history": f"--smartmoe-homes off {ALWAYS_REPLICAS} history",
    "exact replicas": f"--smartmoe-homes off {ALWAYS_REPLICAS} exact",
    "overlap": "--smartmoe-homes off --smartmoe-overlap-degree 2",
    "all of it": f"{MOVES} {ALWAYS_REPLICAS} exact --smartmoe-overlap-degree 2",
}
SAME_BITS = ("shuffled homes",)  # the others add up in another order: replicas' gradients, and those of chunks
PARTS = {  # of a step, that a training has besides those of every one
    "nothing moves": (),
    "all of it": (Part.REPLICAS, Part.PLANNING, Part.MIGRATION),
}
TOLERANCE = 0.02  # of a loss of about 5.5 in bf16, whose rounding is 2**-9 of each activation


def check_losses(curves: dict[str, list[float]], iterations: int) -> None:
    """Judge the losses of some of `TRAININGS`, that without moves among them."""
    still = curves["nothing moves"]
    assert len(still) == iterations
    assert still[-1] < still[0]
    for name, curve in curves.items():
        if name in SAME_BITS:
            assert curve == still, name
        assert max(abs(a - b) for a, b in zip(curve, still, strict=True)) < TOLERANCE, name


def train(run_dir: Path, world_size: int, device: str, name: str, *flags: str, iterations: int) -> list[float]:
    """One of `TRAININGS`: the tiny model in bf16 on mock data, all ranks on one device; returns the losses."""
    mock_data = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
    argv = [*TINY_MODEL, *TINY_TRAINING, *mock_data, "--bf16", "--train-iters", str(iterations), "--smartmoe"]
    argv += [*TRAININGS[name].split(), "--expert-model-parallel-size", str(world_size), *flags]
    run_ranks(_train, world_size, [*argv, "--smartmoe-run-dir", str(run_dir)], device, log_dir=run_dir / "ranks")
    return losses(run_dir)


def check_account(run_dir: Path, iterations: int, *, parts: Collection[Part]) -> StepRecord:
    """Judge the account of a training: every step timed by events on every rank, with these parts besides the usual."""
    found = read_steps(run_dir)
    assert found is not None
    record = found.record
    assert record.basis == "gpu"
    assert record.iteration_N.tolist() == list(range(1, iterations + 1))
    taken_P = record.seconds_NRP.sum(axis=(0, 1)) > 0
    assert [part for part in Part if taken_P[part]] == sorted({Part.OUTSIDE, Part.DISPATCH, Part.EXPERTS, *parts})
    assert (record.seconds_NRP >= 0).all()
    account = json.loads((run_dir / "summary.json").read_text())["account"]
    assert account["basis"] == "gpu"
    assert sum(account["split_s"].values()) == pytest.approx(account["step_s"])
    assert " ms GPU, busiest rank" in (run_dir / "ranks" / "rank0.log").read_text()
    return record


def surroundings() -> tuple[bool, bool]:
    """Whether this rank has the CPU facade, and whether its process has initialized CUDA."""
    import torch

    from megatron_smartmoe.adapter import cpu

    return cpu.is_installed(), torch.cuda.is_initialized()
