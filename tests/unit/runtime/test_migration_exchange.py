"""Turns, checksums and staging memory of an exchange, without a process group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.migration import MigrationStep, plan_migration
from megatron_smartmoe.placement.transfers import LayerLayout, TensorLayout
from megatron_smartmoe.runtime.migration import staging, wire
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.runtime.migration.staging import Arena, Staging, chunk_checksum
from megatron_smartmoe.runtime.migration.wire import turns

RANKS, SLOTS, NUMEL = 3, 2, 100


def layout() -> LayerLayout:
    held_SC2 = np.tile(np.array([0, NUMEL]), (SLOTS, 1, 1))
    tensors = [
        TensorLayout(name=name, numel=NUMEL, itemsize=size, copies=((0,),), held_SC2=held_SC2)
        for name, size in (("weight", 2), ("weight/exp_avg", 4))
    ]
    return LayerLayout(layer=0, tensors=tuple(tensors))


def step(chunk_bytes: int = 1 << 20) -> MigrationStep:
    """Experts 0 and 1 change places on rank 0; 2, 4 and 3, 5 between ranks 1 and 2."""
    after = np.array([[1, 0, 4, 5, 2, 3]])
    plan = plan_migration(
        np.arange(6)[None], after, [layout()], num_ranks=RANKS, staging_bytes=1 << 20, max_chunk_bytes=chunk_bytes
    )
    (only,) = plan.steps
    return only


def rank_state(rank: int) -> LayerState:
    pieces = tuple(
        (
            torch.full((NUMEL,), float(rank * SLOTS + slot), dtype=torch.bfloat16),
            torch.arange(NUMEL) + 1000.0 * (rank * SLOTS + slot),
        )
        for slot in range(SLOTS)
    )
    return LayerState(layout=layout(), shards=(0, 0), pieces=pieces)


@pytest.mark.parametrize("direct_bytes", [48, 1 << 20])
@pytest.mark.parametrize("chunk_bytes", [16, 640, 1 << 20])
def test_messages_in_chunks_carry_everything(
    chunk_bytes: int, direct_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks in one process: what one sends is put where the other stages it."""
    monkeypatch.setattr(wire, "DIRECT_BYTES", direct_bytes)
    one = step(chunk_bytes)
    states = [rank_state(rank) for rank in range(RANKS)]
    memories = [Staging(one, rank, states[rank], Arena(1 << 20, torch.device("cpu"))) for rank in range(RANKS)]
    assert [memory.stage_local() for memory in memories] == [2 * NUMEL * 6, 0, 0]
    for rank in range(RANKS):
        for turn, chunks in enumerate(turns(one, rank)):
            for chunk in chunks:
                if chunk.outgoing:
                    sent = memories[rank].memory_of(chunk, turn)
                    target = memories[chunk.peer].incoming[chunk.message]
                    target[chunk.offset : chunk.offset + chunk.nbytes] = sent
    assert float(states[1].pieces[0][0][0]) == 2  # nothing is written before the commit
    for memory in memories:
        memory.commit()
    for rank, experts in enumerate([[1, 0], [4, 5], [2, 3]]):
        for slot, expert in enumerate(experts):
            weight, moment = states[rank].pieces[slot]
            assert (weight == expert).all()
            assert torch.equal(moment, torch.arange(NUMEL) + 1000.0 * expert)


def test_both_ends_take_the_same_chunks_in_the_same_turns() -> None:
    one = step(640)
    ends = {
        rank: [{(c.message, c.number, c.offset, c.nbytes, c.outgoing) for c in chunks} for chunks in turns(one, rank)]
        for rank in (1, 2)
    }
    assert ends[1] == [{(m, n, o, b, not out) for m, n, o, b, out in chunks} for chunks in ends[2]]
    assert len(ends[1]) == 4  # runs of 200, 400, 200, 400 bytes, of which those of a quarter of 640 go alone
    assert [len(list(turns(step(chunk), 1))) for chunk in (16, 1000, 1 << 20)] == [4, 4, 4]
    assert list(turns(one, 0)) == []


def test_memory_is_bounded_and_reused() -> None:
    arena = Arena(1000, torch.device("cpu"))
    first = arena.take(900)
    assert arena.take(500).data_ptr() == first.data_ptr()
    assert arena.peak_bytes == 900
    with pytest.raises(
        MigrationError, match="1001 bytes of staging memory asked for, --smartmoe-migration-staging-mib"
    ):
        arena.take(1001)


def test_checksums_show_what_a_wire_could_do() -> None:
    torch.manual_seed(2)
    chunk = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    changed = [chunk.clone() for _ in range(4)]
    changed[0][99_999] ^= 1
    changed[1][:1024] = torch.cat([chunk[512:1024], chunk[:512]])
    changed[2] = torch.cat([chunk, torch.zeros(8, dtype=torch.uint8)])[8:]
    changed[3] = torch.roll(chunk, 1)
    values = {int(chunk_checksum(one, 0)) for one in (chunk, *changed)}
    assert len(values) == 5
    assert chunk_checksum(chunk, 1) != chunk_checksum(chunk, 0)  # chunks that change places
    assert chunk_checksum(chunk.clone(), 0) == chunk_checksum(chunk, 0)
    assert chunk_checksum(chunk[:0], 0) == 0


def test_checksums_do_not_depend_on_where_the_chunk_lies() -> None:
    torch.manual_seed(2)
    memory = torch.randint(0, 256, (3 * staging._BLOCK_BYTES + 77,), dtype=torch.uint8)
    expected = chunk_checksum(memory[3:].clone(), 5)
    assert chunk_checksum(memory[3:], 5) == expected


class StuckEvent:
    """A point on a stream that is never reached: a peer does not send."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False


class OneRank:
    """What a wire asks of its group here."""

    aborted = 0

    def abort(self) -> None:
        self.aborted += 1


def test_a_message_that_never_comes_aborts_the_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the stream, on which training goes on, waits for it for ever; nothing uses the group again."""
    group: Any = OneRank()
    monkeypatch.setattr(torch.cuda, "Event", StuckEvent)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    link = wire.Wire(group, [0, 1], timeout_s=0.01)
    with pytest.raises(wire.PeerError, match=r"^layer 3: rank 0 got no answer within 0\.01 s .*was aborted"):
        link.settle(torch.device("cuda"), "layer 3")
    assert group.aborted == 1
    for call in (lambda: link.start(step(), [], []), lambda: link.all_reduce(torch.zeros(1), "later")):
        with pytest.raises(wire.PeerError, match="was aborted after a timeout; it is not used any more"):
            call()


def test_the_watchdog_of_nccl_comes_after_the_timeout() -> None:
    assert wire.group_timeout_s(600.0, "gloo") == 600
    assert wire.group_timeout_s(600.0, "nccl") > 2 * 600
