"""Messages of a migration: chunks between pairs of ranks, and small all-reduces, with a time limit on both.

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
DIRECT_BYTES = 64 << 20  # longest part of a tensor's run that is one chunk
_POLL_S = 2e-4  # seconds between two queries of a CUDA event


def group_timeout_s(timeout_s: float, backend: str) -> float:
    """The timeout to make a migration's process group with, in seconds.

    gloo waits for exactly that long. NCCL's watchdog ends the process at the group's timeout, so that must come later
    than the migration's own, which counts from the last message and not from the first.
    """
    return 2 * timeout_s + 60 if backend == "nccl" else timeout_s


class PeerError(MigrationError):
    """A peer did not answer or its connection broke; the process group cannot be used any more."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a message.

    Attributes:
        message: The message's index in `step.messages`.
        number: The chunk's number in its message.
        offset: Its first byte in the message.
        nbytes: Its length.
        transfer: The one transfer that it is a part of; None if it packs several.
        peer: The worker at the other end.
        outgoing: Whether this worker sends it.
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
    """Chunks that were posted together, with their memory."""

    chunks: tuple[Chunk, ...]
    data: tuple[torch.Tensor, ...]
    works: tuple[dist.Work, ...]


def turns(step: MigrationStep, worker: int) -> Iterator[list[Chunk]]:
    """The chunks of a worker in each turn: at most one to send and one to receive."""
    for members in step.rounds:
        mine = [index for index in members if worker in (step.messages[index].source, step.messages[index].target)]
        for together in itertools.zip_longest(*(_chunks(step, index, worker) for index in mine)):
            yield [chunk for chunk in together if chunk is not None]


def _chunks(step: MigrationStep, index: int, worker: int) -> Iterator[Chunk]:
    message = step.messages[index]
    outgoing = message.source == worker
    peer = message.target if outgoing else message.source
    for number, (offset, nbytes, transfer) in enumerate(_chunk_bounds(step, message)):
        yield Chunk(
            message=index,
            number=number,
            offset=offset,
            nbytes=nbytes,
            transfer=transfer,
            peer=peer,
            outgoing=outgoing,
        )


def _chunk_bounds(step: MigrationStep, message: Message) -> Iterator[tuple[int, int, int | None]]:
    """Offset, length and transfer of each chunk of a message; equal at both ends."""
    packed_from = at = 0
    for row in range(message.first, message.last):
        size = int(step.transfers.nbytes[row])
        if size * 4 >= step.chunk_bytes:  # from a quarter of a chunk on a run is sent from where it lies, unpacked
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
    """Sends, receives and reduces within a group; its errors name the ranks that did not answer.

    On a GPU a message that never comes keeps the stream waiting, and with it whatever training launches afterwards. So
    after the time limit the group's communicator is aborted: that ends its kernels, the stream goes on, and nothing
    uses the group again. It must be made with a longer timeout (`group_timeout_s`), at which NCCL's watchdog would end
    the process.

    Args:
        group: All ranks of the pipeline stage.
        workers: Global rank of each worker.
        timeout_s: Longest wait; gloo uses the timeout that the group was made with.
    """

    def __init__(self, group: dist.ProcessGroup, workers: Sequence[int], timeout_s: float) -> None:
        self._group, self._workers, self._timeout_s = group, list(workers), timeout_s
        self._aborted = False

    def start(self, step: MigrationStep, chunks: Sequence[Chunk], data: Sequence[torch.Tensor]) -> Batch:
        """Post chunks; their memory must not be touched until `finish`."""
        self._check_usable()
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
        """Wait for a batch. On CUDA the current stream waits and the host does not; `settle` makes it wait."""
        one_each = len(batch.works) == len(batch.chunks)  # NCCL has one handle for the whole batch
        for index, work in enumerate(batch.works):
            chunks = batch.chunks[index : index + 1] if one_each else batch.chunks
            self._wait(work, f"layer {step.layer}: {self._who(chunks)}")

    def settle(self, device: torch.device, what: str) -> None:
        """Make the host wait for everything that the current stream waits for. On the CPU there is nothing to do."""
        if device.type != "cuda":
            return
        reached = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reached.record()
        deadline = time.monotonic() + self._timeout_s
        while not reached.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                self._aborted = True
                self._group.abort()
                raise self._peer_error(what, RuntimeError("timed out, the communicator was aborted"))
            time.sleep(_POLL_S)

    def all_reduce(self, values: torch.Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce in place over the whole group; the host waits for the result."""
        self._check_usable()
        try:
            work = dist.all_reduce(values, op=op, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._peer_error(what, error) from error
        self._wait(work, what)
        self.settle(values.device, what)

    def _wait(self, work: dist.Work, what: str) -> None:
        """Wait up to the group's timeout: on gloo that ends the operation, a timeout given here only the waiting."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._peer_error(what, error) from error

    def _check_usable(self) -> None:
        if self._aborted:
            raise PeerError("the process group of the migrations was aborted after a timeout; it is not used any more")

    def name(self, worker: int) -> str:
        """The name of a worker in error messages."""
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
