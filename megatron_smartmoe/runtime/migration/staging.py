"""Staging memory of a migration: incoming state waits in it for the commit, and two chunks are sent from it.

One arena is sliced anew for each step. Training allocates it at its start, when a lack of memory is still a matter of
flags; it could grow to the need of a larger plan, never above the user's bound. It stays allocated, because receiving
into memory that is new to the process takes three times as long. Incoming messages lie whole in it, because all or
nothing means that no old state may be overwritten before everything has arrived.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_smartmoe.errors import MigrationError
from megatron_smartmoe.placement.migration import ALIGNMENT_BYTES, STAGING_FLAG, MigrationStep
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.runtime.migration.wire import Chunk
from megatron_smartmoe.spec.arrays import IntArray

_ROW_BYTES = 512  # bytes that a checksum sums before it weights the sum
_BLOCK_BYTES = 1 << 20  # bytes of an unaligned chunk that are copied at a time
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number: spreads the weights over 64 bits


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch had no memory: an error of its own on a GPU, a text on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Arena:
    """The staging memory that all steps use, one after the other.

    Args:
        limit_bytes: The bound that `--smartmoe-migration-staging-mib` gives.
        device: The device of the experts' tensors.

    Attributes:
        peak_bytes: The most bytes that were ever allocated.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        self.limit_bytes, self.device, self.peak_bytes = limit_bytes, device, 0
        self._bytes: torch.Tensor | None = None

    def take(self, nbytes: int) -> torch.Tensor:
        """The first `nbytes` of the arena, uint8; whatever was taken before is overwritten."""
        if nbytes > self.limit_bytes:
            raise MigrationError(
                f"{nbytes} bytes of staging memory asked for, {STAGING_FLAG} allows {self.limit_bytes}"
            )
        if self._bytes is None or len(self._bytes) < nbytes:
            self._bytes = None  # the old one first, so that the two never exist together
            try:
                self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the class itself
                reason = str(error).partition("\n")[0]
                raise MigrationError(
                    f"no memory for {nbytes} bytes of staging on {self.device} ({reason}). Lower {STAGING_FLAG}"
                ) from error
            self.peak_bytes = max(self.peak_bytes, nbytes)
        return self._bytes[:nbytes]


def needed_bytes(step: MigrationStep, worker: int) -> int:
    """The staging memory of one worker in one step: two chunks that are sent, what arrives, and what stays."""
    moved = step.transfers
    local_bytes = int(moved.nbytes[(moved.source == worker) & (moved.target == worker)].sum())
    arriving_bytes = sum(padded(m.nbytes) for m in step.messages if m.target == worker)
    return 2 * step.chunk_bytes + arriving_bytes + padded(local_bytes)


class Staging:
    """The staging memory of one worker in one step.

    Attributes:
        chunks: Two buffers for packed chunks that are sent.
        incoming: Staged bytes of each message for this worker, by its index in `step.messages`.
        local: Staged bytes of the transfers between slots of this worker.
    """

    def __init__(self, step: MigrationStep, worker: int, state: LayerState, arena: Arena) -> None:
        self._step, self._state = step, state
        moved = step.transfers
        self._local = np.nonzero((moved.source == worker) & (moved.target == worker))[0]
        local_bytes = int(moved.nbytes[self._local].sum())
        sizes = {index: m.nbytes for index, m in enumerate(step.messages) if m.target == worker}
        memory = arena.take(needed_bytes(step, worker))
        self.chunks = memory[: step.chunk_bytes], memory[step.chunk_bytes : 2 * step.chunk_bytes]
        self.incoming: dict[int, torch.Tensor] = {}
        at = 2 * step.chunk_bytes
        for index, nbytes in sizes.items():
            self.incoming[index] = memory[at : at + nbytes]
            memory[at + nbytes : at + padded(nbytes)].zero_()
            at += padded(nbytes)
        self.local = memory[at : at + local_bytes]

    def stage_local(self) -> int:
        """Copy the transfers between slots of this worker to staging memory; returns their number of bytes."""
        self._copy(self._local, self.local, into_staging=True)
        return len(self.local)

    def memory_of(self, chunk: Chunk, turn: int) -> torch.Tensor:
        """The memory that a chunk is received into or sent from.

        A chunk is sent from the live tensor if it is a part of one that is on the device, and otherwise packed into
        this turn's free buffer.
        """
        if not chunk.outgoing:
            return self.incoming[chunk.message][chunk.offset : chunk.offset + chunk.nbytes]
        message = self._step.messages[chunk.message]
        sizes = self._step.transfers.nbytes[message.first : message.last]
        starts = np.cumsum(sizes) - sizes
        buffer = self.chunks[turn % 2][: chunk.nbytes]
        if chunk.transfer is not None:
            inner = chunk.offset - int(starts[chunk.transfer - message.first])
            live = self._source(chunk.transfer)[inner : inner + chunk.nbytes]
            return live if live.device == buffer.device else buffer.copy_(live)
        for row in np.nonzero((starts >= chunk.offset) & (starts < chunk.offset + chunk.nbytes))[0].tolist():
            at = int(starts[row]) - chunk.offset
            buffer[at : at + int(sizes[row])].copy_(self._source(message.first + row))
        return buffer

    def commit(self) -> None:
        """Write all staged bytes into the live tensors."""
        for index, staged in self.incoming.items():
            message = self._step.messages[index]
            self._copy(np.arange(message.first, message.last), staged, into_staging=False)
        self._copy(self._local, self.local, into_staging=False)

    def _copy(self, rows: IntArray, staged: torch.Tensor, *, into_staging: bool) -> None:
        at = 0
        for row in rows.tolist():
            part = staged[at : at + int(self._step.transfers.nbytes[row])]
            at += len(part)
            if into_staging:
                part.copy_(self._source(row))
            else:
                self._target(row).copy_(part)

    def _source(self, row: int) -> torch.Tensor:
        moved = self._step.transfers
        run = int(moved.tensor[row]), int(moved.start[row]), int(moved.stop[row])
        return self._state.run_bytes(int(moved.from_slot[row]), *run)

    def _target(self, row: int) -> torch.Tensor:
        moved = self._step.transfers
        run = int(moved.tensor[row]), int(moved.start[row]), int(moved.stop[row])
        return self._state.run_bytes(int(moved.to_slot[row]), *run)


def padded(nbytes: int) -> int:
    """A number of bytes, rounded up to the alignment of a message."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def chunk_checksum(chunk: torch.Tensor, number: int) -> torch.Tensor:
    """A 64-bit checksum of a chunk's bytes, int64 scalar on its device; one pass at the speed of memory.

    Rows of 512 bytes are summed as 64-bit words, and the sums weighted by their position. So a flipped bit and
    misplaced bytes are detected; words that change places within a row are not. Weights per word would cost a second
    pass to detect what no transport is known to do.

    Args:
        chunk: The bytes, uint8; a chunk that does not start at a multiple of 8 bytes is copied block by block.
        number: The chunk's number within its message.
    """
    total = torch.zeros((), dtype=torch.int64, device=chunk.device)
    aligned = chunk.storage_offset() % 8 == 0 and chunk.data_ptr() % 8 == 0
    block_bytes = max(len(chunk), 1) if aligned else _BLOCK_BYTES
    for start in range(0, len(chunk), block_bytes):
        block = chunk[start : start + block_bytes]
        total += _rows_checksum(block if aligned else block.clone(), start // _ROW_BYTES)
    return total * (2 * number + 1)


def _rows_checksum(block: torch.Tensor, first_row: int) -> torch.Tensor:
    whole = len(block) // _ROW_BYTES * _ROW_BYTES
    rest = torch.zeros(_ROW_BYTES, dtype=torch.uint8, device=block.device)
    rest[: len(block) - whole].copy_(block[whole:])
    sums = torch.cat(
        [
            block[:whole].view(torch.int64).view(-1, _ROW_BYTES // 8).sum(dim=1),
            rest.view(torch.int64).sum(0, keepdim=True),
        ]
    )
    weights = torch.arange(first_row, first_row + len(sums), device=block.device).mul_(_ODD).bitwise_or_(1)
    return weights.mul_(sums).sum()
