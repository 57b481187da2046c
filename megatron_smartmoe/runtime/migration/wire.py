"""The wire of a migration: chunks of messages between pairs of ranks, and small all-reduces, with a time limit on both.

A step's messages come in rounds in which every rank sends at most one and receives at most one, and a round's messages
in chunks: long runs of a tensor go as they are, short ones are packed together. All ranks walk through (round, chunk)
in the same order, so that even a transport that runs one operation after the other, as NCCL does, cannot run into a
deadlock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.migration import Message, MigrationStep

TIMEOUT_FLAG = "--smartmoe-migration-timeout-s"
DIRECT_BYTES = 64 << 20  # longest part of a run that is sent at once
_POLL_S = 2e-4


class PeerError(MigrationError):
    """A peer did not answer, or the connection to it broke; the process group cannot be used any more."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a message.

    Attributes:
        message: index in `step.messages`.
        number: of the chunk in its message.
        offset: first byte in the message.
        nbytes: its length.
        transfer: the one transfer of which it is a part, or None: parts of several, to be packed.
        peer: worker at the other end.
        outgoing: sent by this worker, not received.
    """

    message: int
    number: int
    offset: int
    nbytes: int
    transfer: int | None
    peer: int
    outgoing: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Chunks that are on their way together, with their memory."""

    chunks: tuple[Chunk, ...]
    data: tuple[torch.Tensor, ...]
    works: tuple[dist.Work, ...]


def turns(step: MigrationStep, worker: int) -> Iterator[list[Chunk]]:
    """What a worker does in each turn: at most one chunk out and one in."""
    for members in step.rounds:
        mine = [index for index in members if worker in (step.messages[index].source, step.messages[index].target)]
        for together in itertools.zip_longest(*(_chunks(step, index, worker) for index in mine)):
            yield [chunk for chunk in together if chunk is not None]


def _chunks(step: MigrationStep, index: int, worker: int) -> Iterator[Chunk]:
    message = step.messages[index]
    outgoing = message.source == worker
    peer = message.target if outgoing else message.source
    for number, (offset, nbytes, transfer) in enumerate(_cuts(step, message)):
        yield Chunk(
            message=index,
            number=number,
            offset=offset,
            nbytes=nbytes,
            transfer=transfer,
            peer=peer,
            outgoing=outgoing,
        )


def _cuts(step: MigrationStep, message: Message) -> Iterator[tuple[int, int, int | None]]:
    """Offset, length and transfer of each chunk; equal at both ends."""
    packed_from = at = 0
    for row in range(message.first, message.last):
        size = int(step.transfers.nbytes[row])
        if size * 4 >= step.chunk_bytes:  # long enough to go alone
            if packed_from < at:
                yield packed_from, at - packed_from, None
            for start in range(0, size, DIRECT_BYTES):
                yield at + start, min(DIRECT_BYTES, size - start), row
            packed_from = at + size
        elif at + size - packed_from > step.chunk_bytes:
            yield packed_from, at - packed_from, None
            packed_from = at
        at += size
    if packed_from < at:
        yield packed_from, at - packed_from, None


class Wire:
    """Sends, receives and reduces within a group, and says who did not answer.

    Args:
        group: all ranks concerned.
        workers: global rank of each worker.
        timeout_s: how long a wait may take; gloo uses the timeout that the group was made with.
    """

    def __init__(self, group: dist.ProcessGroup, workers: Sequence[int], timeout_s: float) -> None:
        self._group, self._workers, self._timeout_s = group, list(workers), timeout_s

    def start(self, step: MigrationStep, chunks: Sequence[Chunk], data: Sequence[torch.Tensor]) -> Batch:
        """Post chunks; their memory must stay as it is until `finish`."""
        operations = [
            dist.P2POp(dist.isend if c.outgoing else dist.irecv, part, self._workers[c.peer], self._group)
            for c, part in zip(chunks, data, strict=True)
        ]
        try:
            works = tuple(dist.batch_isend_irecv(operations)) if operations else ()
        except RuntimeError as error:
            raise self._peer_error(f"layer {step.layer}: {self._who(chunks)}", error) from error
        return Batch(chunks=tuple(chunks), data=tuple(data), works=works)

    def finish(self, step: MigrationStep, batch: Batch) -> None:
        """Wait for a batch. CUDA: the current stream waits, not the host; `settle` does at the end."""
        one_each = len(batch.works) == len(batch.chunks)  # NCCL has one handle for the whole batch
        for index, work in enumerate(batch.works):
            chunks = batch.chunks[index : index + 1] if one_each else batch.chunks
            self._wait(work, f"layer {step.layer}: {self._who(chunks)}")

    def settle(self, device: torch.device, what: str) -> None:
        """Have the host wait for everything that the current stream waits for. Nothing to do on the CPU."""
        if device.type != "cuda":
            return
        reached = torch.cuda.Event()
        reached.record()
        deadline = time.monotonic() + self._timeout_s
        while not reached.query():
            if time.monotonic() > deadline:
                raise self._peer_error(what, RuntimeError("timed out"))
            time.sleep(_POLL_S)

    def all_reduce(self, values: torch.Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce in place over the whole group; the host waits for the result."""
        try:
            work = dist.all_reduce(values, op=op, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._peer_error(what, error) from error
        self._wait(work, what)
        self.settle(values.device, what)

    def _wait(self, work: dist.Work, what: str) -> None:
        """gloo: until the group's timeout, which ends the operation (one given here would end the waiting only)."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._peer_error(what, error) from error

    def name(self, worker: int) -> str:
        """How a worker is called in messages."""
        return f"rank {self._workers[worker]}"

    def _who(self, chunks: Sequence[Chunk]) -> str:
        return " or ".join(
            f"{'sending to' if chunk.outgoing else 'receiving from'} {self.name(chunk.peer)}" for chunk in chunks
        )

    def _peer_error(self, what: str, error: RuntimeError) -> PeerError:
        reason = str(error).splitlines()[0][:200] if str(error) else "no reason given"
        return PeerError(
            f"{what}: rank {dist.get_rank()} got no answer within {self._timeout_s:g} s ({TIMEOUT_FLAG}) or lost the "
            f"connection ({reason}). Nothing of this step is committed; look at that rank's log first."
        )
