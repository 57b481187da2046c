"""A fault in a migration is detected, and either nothing has moved or every rank stops training.

One job of four ranks (EP2 x EDP2, bf16, distributed optimizer) runs all cases; the tests below judge its results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.experts import Job, Mix
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

MIX = Mix(edp=2, bf16=True, distributed=True, overlap=True)
UNMOVED = "; no expert was moved"


def error_of(function: Callable[[], Any]) -> str | None:
    """Text of the project's error that a call ends with, after its class; None when it ends well."""
    from megatron_smartmoe.errors import SmartMoEError

    try:
        function()
    except SmartMoEError as error:
        return f"{type(error).__name__}: {error}"
    return None


def unchanged_by(job: Job, migrate: Callable[[], Any]) -> bool:
    """The check that every migration of `test_migration` passes."""
    before = job.fingerprints()
    migrate()
    return job.fingerprints() == before


def good() -> bool:
    job = Job(MIX)
    job.step()
    return unchanged_by(job, lambda: job.migrate(job.random_homes(1), job.exchange()))


def moments_left_out() -> bool:
    """The original SmartMoE's fault: weights (here even main weights) move, moments stay."""
    job = Job(MIX)
    job.step()
    full = job.states.states

    def without_moments() -> dict[int, Any]:
        return {layer: keep(state, lambda name: "exp_avg" not in name) for layer, state in full().items()}

    def migrate() -> None:
        with mock.patch.object(job.states, "states", without_moments):
            job.migrate(job.random_homes(1), job.exchange())

    return unchanged_by(job, migrate)


def keep(state: Any, wanted: Callable[[str], bool]) -> Any:
    """A layer's state with some tensors only."""
    from megatron_smartmoe.placement.transfers import LayerLayout
    from megatron_smartmoe.runtime.migration.expert_tensors import LayerState

    chosen = [index for index, tensor in enumerate(state.layout.tensors) if wanted(tensor.name)]
    return LayerState(
        layout=LayerLayout(layer=state.layout.layer, tensors=tuple(state.layout.tensors[index] for index in chosen)),
        shards=tuple(state.shards[index] for index in chosen),
        pieces=tuple(tuple(pieces[index] for index in chosen) for pieces in state.pieces),
    )


def moments_swapped() -> bool:
    """exp_avg is written where exp_avg_sq belongs, and the reverse."""
    from megatron_smartmoe.runtime.migration.staging import Staging

    job = Job(MIX)
    job.step()
    names = [tensor.name for tensor in next(iter(job.states.states().values())).layout.tensors]
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def swapped(staging: Any, row: int) -> Any:
        moved = staging._step.transfers
        parameter, _, kind = names[int(moved.tensor[row])].rpartition("/")
        tensor = names.index(f"{parameter}/{other[kind]}") if kind in other else int(moved.tensor[row])
        return staging._state.run_bytes(int(moved.to_slot[row]), tensor, int(moved.start[row]), int(moved.stop[row]))

    def migrate() -> None:
        with mock.patch.object(Staging, "_target", swapped):
            job.migrate(job.random_homes(1), job.exchange())

    return unchanged_by(job, migrate)


def one_rank_does_not_commit() -> bool:
    from megatron_smartmoe.runtime.migration.staging import Staging

    job = Job(MIX)
    job.step()
    commit = Staging.commit if dist.get_rank() != 1 else lambda staging: None
    with mock.patch.object(Staging, "commit", commit):
        return unchanged_by(job, lambda: job.migrate(job.random_homes(1), job.exchange()))


def weights_not_gathered() -> bool:
    """--overlap-param-gather leaves stale weights after a step; without the forced gather they would be moved."""
    job = Job(MIX)
    job.step()
    with mock.patch.object(job.ddp, "start_param_sync"):
        job.migrate(job.random_homes(1), job.exchange())
    return job.main_weights_agree()


def a_bit_flips() -> dict[str, Any]:
    """A bit flips on rank 2 in step 2: step 1 stays committed, step 2 writes nothing, later ones work."""
    job = Job(MIX)
    job.step()
    before = job.fingerprints()
    steps: list[int] = []

    def flip(point: str, step: Any, chunk: torch.Tensor | None) -> None:
        if point == "received" and dist.get_rank() == 2 and step.layer == 1:
            assert chunk is not None
            chunk[len(chunk) // 2] ^= 16

    exchange = job.exchange(probe=flip)
    set_homes = job.set_homes

    def noting(step: Any) -> None:
        steps.append(step.layer)
        set_homes(step)

    wanted = job.random_homes(1)
    with mock.patch.object(job, "set_homes", noting):
        error = error_of(lambda: job.migrate(wanted, exchange))
    facts = {"error": error, "committed": list(steps), "unchanged": job.fingerprints() == before}
    exchange._probe = lambda point, step, chunk: None
    job.migrate(wanted, exchange)
    return facts | {"again": job.fingerprints() == before, "arrived": bool((job.homes_LE == wanted).all())}


def memory_is_refused() -> dict[str, Any]:
    """Rank 2 gets no staging memory: no rank moves anything, none waits, and a later migration works."""
    job = Job(MIX)
    job.step()
    before, wanted, exchange = job.fingerprints(), job.random_homes(1), job.exchange()
    empty = torch.empty

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8 and dist.get_rank() == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.\nStack")
        return empty(*args, **kwargs)

    begin = time.monotonic()
    with mock.patch("torch.empty", refuse):
        error = error_of(lambda: job.migrate(wanted, exchange))
    facts = {"error": error, "seconds": time.monotonic() - begin, "unchanged": job.fingerprints() == before}
    job.migrate(wanted, exchange)
    return facts | {"again": job.fingerprints() == before, "arrived": bool((job.homes_LE == wanted).all())}


def memory_ends_within_a_step() -> dict[str, Any]:
    """Rank 1 runs out of memory between messages: it continues with them, and no rank commits or waits."""
    from megatron_smartmoe.runtime.migration import exchange as module

    job = Job(MIX)
    job.step()
    before, wanted, exchange = job.fingerprints(), job.random_homes(1), job.exchange()
    calls, checksum = [], module.chunk_checksum

    def fails_once(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nStack")
        return checksum(*args)

    begin = time.monotonic()
    with mock.patch.object(module, "chunk_checksum", fails_once):
        error = error_of(lambda: job.migrate(wanted, exchange))
    facts = {"error": error, "seconds": time.monotonic() - begin, "unchanged": job.fingerprints() == before}
    job.migrate(wanted, exchange)
    return facts | {"again": job.fingerprints() == before, "arrived": bool((job.homes_LE == wanted).all())}


def memory_is_reserved() -> dict[str, Any]:
    """Staging memory is taken at the start; without it on rank 2 every rank stops there, and nobody waits."""
    job = Job(MIX)
    refused, exchange = job.exchange(), job.exchange()
    empty = torch.empty

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8 and dist.get_rank() == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return empty(*args, **kwargs)

    with mock.patch("torch.empty", refuse):
        error = error_of(lambda: refused.reserve(1 << 19))
    exchange.reserve(1 << 30)  # more than the bound
    memory = exchange._arena._bytes
    job.step()
    job.migrate(job.random_homes(1), exchange)
    return {"error": error, "bytes": len(memory), "kept": exchange._arena._bytes is memory}


def no_plan_on_one_rank() -> dict[str, Any]:
    """A rank that cannot plan takes part in the comparison, so that the others do not wait for it."""
    job = Job(MIX)
    job.step()
    exchange = job.exchange()
    begin = time.monotonic()
    if dist.get_rank() == 3:
        job.states.prepare(gradients_spent=True)
        job.states.states()
        error = error_of(lambda: exchange.refuse("out of memory (CUDA out of memory.)"))
    else:
        error = error_of(lambda: job.migrate(job.random_homes(1), exchange))
    return {"error": error, "seconds": time.monotonic() - begin}


def plans_differ() -> dict[str, Any]:
    job = Job(MIX)
    job.step()
    before = job.fingerprints()
    homes = job.random_homes(1 if dist.get_rank() < 3 else 2)
    error = error_of(lambda: job.migrate(homes, job.exchange()))
    return {"error": error, "unchanged": job.fingerprints() == before}


def staging_is_bounded() -> dict[str, Any]:
    """Memory for about one expert's swap at a time; what is really allocated is measured."""
    job = Job(MIX)
    job.step()
    largest: list[int] = []
    empty = torch.empty

    def measured(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8:
            largest.append(int(args[0]))
        return empty(*args, **kwargs)

    wanted = job.homes_LE.copy()
    for row in wanted:
        row[[0, 5]] = row[[5, 0]]
        row[[1, 4]] = row[[4, 1]]
    bound = 50_000
    exchange = job.exchange(staging_bytes=bound)
    before = job.fingerprints()
    with mock.patch("torch.empty", measured):
        plan, report = job.migrate(wanted, exchange)
    return {
        "bound": bound,
        "allocated": max(largest),
        "peak": report.peak_staging_bytes,
        "steps": report.steps,
        "layers": len(wanted),
        "cut": max(-(-m.nbytes // step.chunk_bytes) for step in plan.steps for m in step.messages),
        "unchanged": job.fingerprints() == before,
        "too_small": error_of(lambda: job.migrate(job.random_homes(1), job.exchange(staging_bytes=5_000))),
    }


def gradients_are_there() -> dict[str, str | None]:
    """Errors of a migration that is started at each point of an iteration; None where it is allowed."""
    job = Job(MIX)
    job.step()  # the first iteration reduces at its end, the others as gradients come
    facts = {"after the step": error_of(lambda: job.states.prepare(gradients_spent=True))}
    facts["not said to be spent"] = error_of(lambda: job.states.prepare(gradients_spent=False))
    job.ddp.zero_grad_buffer()
    facts["zeroed"] = error_of(lambda: job.states.prepare(gradients_spent=False))
    with job.ddp.no_sync():
        job.micro_batch(0)
        facts["between micro-batches"] = error_of(lambda: job.states.prepare(gradients_spent=True))
    job.micro_batch(1)
    facts["reduction on its way"] = error_of(lambda: job.states.prepare(gradients_spent=True))
    job.ddp.finish_grad_sync()
    facts["before the optimizer"] = error_of(lambda: job.states.prepare(gradients_spent=False))
    job.optimizer.step()
    return facts


def a_peer_is_slow() -> dict[str, Any]:
    """Rank 1 sleeps in the middle of a step. The others give up, no rank has written, and training continues."""

    def sleep(point: str, step: Any, chunk: torch.Tensor | None) -> None:
        if point == "staged" and dist.get_rank() == 1:
            time.sleep(6)

    job = Job(MIX, timeout_s=2)
    job.step()
    job.states.prepare(gradients_spent=True)
    before = [p.clone() for p in pieces(job)]
    homes = job.homes_LE.copy()
    exchange = job.exchange(probe=sleep)
    error = error_of(lambda: job.migrate(job.random_homes(1), exchange))
    written = any(not torch.equal(a, b) for a, b in zip(before, pieces(job), strict=True))
    later = error_of(lambda: exchange.execute(None, {}, job.set_homes))
    prepared = error_of(lambda: job.states.prepare(gradients_spent=True))
    job.step()
    moved = bool((job.homes_LE != homes).any())
    return {"error": error, "written": written, "moved": moved, "later": later, "prepared": prepared}


def a_peer_is_gone() -> dict[str, Any]:
    """Rank 1's process ends in the middle of a step, and its connections with it. The last case, therefore."""

    def die(point: str, step: Any, chunk: torch.Tensor | None) -> None:
        if point == "staged" and dist.get_rank() == 1:
            raise Gone

    job = Job(MIX)
    job.step()
    job.states.prepare(gradients_spent=True)
    before = [p.clone() for p in pieces(job)]
    try:
        error = error_of(lambda: job.migrate(job.random_homes(1), job.exchange(probe=die)))
    except Gone:
        return {}
    return {"error": error, "written": any(not torch.equal(a, b) for a, b in zip(before, pieces(job), strict=True))}


class Gone(Exception):
    """Ends a rank's part in the job."""


def pieces(job: Job) -> list[torch.Tensor]:
    return [piece for state in job.states.states().values() for row in state.pieces for piece in row]


CASES = [
    good,
    moments_left_out,
    moments_swapped,
    one_rank_does_not_commit,
    weights_not_gathered,
    a_bit_flips,
    plans_differ,
    memory_is_refused,
    memory_ends_within_a_step,
    memory_is_reserved,
    no_plan_on_one_rank,
    staging_is_bounded,
    gradients_are_there,
    a_peer_is_slow,
    a_peer_is_gone,
]


def run_cases() -> dict[str, Any]:
    return {case.__name__: case() for case in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank in each case."""
    return run_ranks(run_cases, MIX.world_size, log_dir=tmp_path_factory.mktemp("faults"), timeout_s=200)


def of(found: list[dict[str, Any]], case: Callable[[], Any]) -> list[Any]:
    return [rank[case.__name__] for rank in found]


def test_a_good_migration_passes_the_check(found: list[dict[str, Any]]) -> None:
    assert of(found, good) == [True] * 4


@pytest.mark.parametrize("fault", [moments_left_out, moments_swapped, one_rank_does_not_commit, weights_not_gathered])
def test_mutation_is_caught(fault: Callable[[], bool], found: list[dict[str, Any]]) -> None:
    """The same check fails on every rank; stale weights are detected on the ranks that receive some."""
    if fault is weights_not_gathered:
        assert not all(of(found, fault))
    else:
        assert of(found, fault) == [False] * 4


def test_a_rank_without_memory_stops_the_migration_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(of(found, memory_is_refused)):
        if rank == 2:
            assert facts["error"].startswith("MigrationError: rank 2: no memory for ")
            assert "can't allocate memory: you tried to allocate 1 bytes.). Lower --smartmoe-" in facts["error"]
            assert facts["error"].endswith("; nothing was moved.")
        else:
            text = "another rank has no memory for staging, as its log says; nothing was moved."
            assert facts["error"] == f"MigrationError: {text}"
        assert facts["seconds"] < 60  # not the migration's timeout
        assert facts["unchanged"]
        assert facts["again"]
        assert facts["arrived"]


def test_memory_that_ends_within_a_step_stops_it_on_every_rank(found: list[dict[str, Any]]) -> None:
    uncommitted = "nothing of this step is committed, its experts stay where they are."
    for rank, facts in enumerate(of(found, memory_ends_within_a_step)):
        reason = "another rank ran out of memory, as its log says"
        if rank == 1:
            reason = "rank 1: out of memory (CUDA out of memory. Tried to allocate 2.00 MiB.)"
        assert facts["error"] == f"MigrationError: layer 0: {reason}; {uncommitted}"
        assert facts["seconds"] < 25  # the migration's timeout is 30
        assert facts["unchanged"]
        assert facts["again"]
        assert facts["arrived"]


def test_staging_memory_is_taken_at_the_start(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(of(found, memory_is_reserved)):
        reason = "another rank has no memory for staging, as its log says"
        if rank == 2:
            reason = (
                "rank 2: no memory for 524288 bytes of staging on cpu (CUDA out of memory. Tried to allocate 1.00 "
                "GiB.). Lower --smartmoe-migration-staging-mib"
            )
        assert facts["error"] == f"MigrationError: {reason}; nothing was moved."
        assert facts["bytes"] == 1 << 20
        assert facts["kept"]


def test_a_rank_without_a_plan_keeps_nobody_waiting(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(of(found, no_plan_on_one_rank)):
        reason = "another rank has no memory for staging, as its log says"
        if rank == 3:
            reason = "rank 3: out of memory (CUDA out of memory.)"
        assert facts["error"] == f"MigrationError: {reason}; nothing was moved."
        assert facts["seconds"] < 25


def test_a_flipped_bit_stops_its_step_on_every_rank(found: list[dict[str, Any]]) -> None:
    for facts in of(found, a_bit_flips):
        assert facts["error"].startswith("MigrationError: layer 1: ")
        assert "messages arrived with another checksum, the first from rank " in facts["error"]
        assert "to rank 2; nothing of this step is committed, its experts stay where they are." in facts["error"]
        assert facts["committed"] == [0]
        assert facts["unchanged"]
        assert facts["again"]
        assert facts["arrived"]


def test_different_plans_move_nothing(found: list[dict[str, Any]]) -> None:
    for facts in of(found, plans_differ):
        assert facts["error"].startswith("MigrationError: the ranks have different migration plans (digest ")
        assert facts["unchanged"]


def test_staging_memory_is_bounded(found: list[dict[str, Any]]) -> None:
    for facts in of(found, staging_is_bounded):
        assert facts["allocated"] == facts["peak"] <= facts["bound"]
        assert facts["steps"] > facts["layers"]  # a layer's change was cut into steps
        assert facts["cut"] > 1  # and a message into chunks
        assert facts["unchanged"]
        assert "--smartmoe-migration-staging-mib allows 0.00476837" in facts["too_small"]


def test_gradients_are_not_lost(found: list[dict[str, Any]]) -> None:
    for facts in of(found, gradients_are_there):
        assert facts == {
            "after the step": None,
            "not said to be spent": "MigrationError: the optimizer has not used the experts' gradients yet" + UNMOVED,
            "zeroed": None,
            "between micro-batches": "MigrationError: micro-batches of this iteration have not run yet" + UNMOVED,
            "reduction on its way": "MigrationError: a gradient reduction of the experts is in flight" + UNMOVED,
            "before the optimizer": "MigrationError: the optimizer has not used the experts' gradients yet" + UNMOVED,
        }


def test_a_slow_peer_is_named_and_nothing_is_written(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(of(found, a_peer_is_slow)):
        late = ("CommitUnknownError: layer 0: ",) if rank == 1 else ()  # it may meet the others' last words
        assert facts["error"].startswith(("PeerError: layer 0: comparing checksums: ", *late))
        assert rank == 1 or "--smartmoe-migration-timeout-s" in facts["error"]
        assert not facts["written"]
        assert not facts["moved"]
        assert facts["prepared"].startswith("PeerError: the ranks of this stage cannot reach each other")
        assert facts["later"].startswith(
            "MigrationError: expert migration is disabled: an earlier one lost its process group"
        )


def test_a_dead_peer_is_an_error_and_nothing_is_written(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(of(found, a_peer_is_gone)):
        if rank != 1:
            assert facts["error"].startswith("PeerError: layer 0: comparing checksums: ")
            assert not facts["written"]
