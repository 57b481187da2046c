"""A migration plan: which bytes move from where to where when homes change, known before anything moves.

Homes are two tables, expert -> global slot, before and after. Slot g lies on expert-parallel rank g // S, slot g % S.
Every change of homes is a permutation of slots and falls into cycles; a set of whole cycles can be carried out alone
and leaves valid homes. So bounded memory and all-or-nothing are compatible: a layer's change is divided into steps of
whole cycles, each of which fits the staging memory and is committed at once or not at all.

Which parts move, and that each byte of sharded state moves once, is in `transfers.py`; a worker is one rank of the grid
of R expert-parallel times D expert-data-parallel ranks, numbered w = r * D + d.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.cost.memory.buffers import MIGRATION_CHUNK_BYTES
from megatron_smartmoe.errors import MigrationError, PlanError
from megatron_smartmoe.placement.transfers import LayerLayout, Transfers, transfers_of
from megatron_smartmoe.spec.arrays import IntArray

ALIGNMENT_BYTES = 16  # each message starts at a multiple of it in staging memory: enough for any element type
STAGING_FLAG = "--smartmoe-migration-staging-mib"


@dataclass(frozen=True, kw_only=True)
class Message:
    """Everything that one worker sends another in a step: transfers `first` to `last` (exclusive), packed."""

    source: int
    target: int
    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MigrationStep:
    """The unit of commitment: whole cycles of one layer.

    Attributes:
        layer: layer number.
        experts: those that move.
        to_slot: their new global slots.
        transfers: everything that moves, also what stays on its worker.
        messages: what goes over the wire, in the order of `transfers`.
        rounds: indices of messages; in a round every worker sends at most one and receives at most one.
        chunk_bytes: messages are sent in chunks of this size.
        staging_bytes: memory that the busiest worker needs: what it receives, and two chunks to send from.
    """

    layer: int
    experts: tuple[int, ...]
    to_slot: tuple[int, ...]
    transfers: Transfers
    messages: tuple[Message, ...]
    rounds: tuple[tuple[int, ...], ...]
    chunk_bytes: int
    staging_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MigrationPlan:
    """Steps, to be carried out in their order, and the bytes that they send.

    Attributes:
        steps: empty when nothing changes.
        sent_bytes_W: bytes that worker w sends.
        received_bytes_W: bytes that worker w receives.
        digest: 16 hexadecimal digits of homes, layouts and limits, which ranks compare before they start.
    """

    steps: tuple[MigrationStep, ...]
    sent_bytes_W: IntArray
    received_bytes_W: IntArray
    digest: str

    @property
    def wire_bytes(self) -> int:
        """Bytes that the whole grid sends."""
        return int(self.sent_bytes_W.sum())

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging memory that the step and worker with the largest need takes."""
        return max((step.staging_bytes for step in self.steps), default=0)


def plan_migration(
    before_LE: IntArray,
    after_LE: IntArray,
    layouts: Sequence[LayerLayout],
    *,
    num_ranks: int,
    staging_bytes: int,
    max_chunk_bytes: int = MIGRATION_CHUNK_BYTES,
) -> MigrationPlan:
    """Plan the migration from one homes table to another. A pure function: equal on every rank for equal arguments.

    Args:
        before_LE: global slot of every expert now; row i belongs to `layouts[i]`.
        after_LE: global slot of every expert after the migration.
        layouts: tensors of an expert, one entry per layer.
        num_ranks: R.
        staging_bytes: memory that a worker may use for staging.
        max_chunk_bytes: upper bound of a chunk.

    Raises:
        PlanError: a row is not a permutation of the slots.
        MigrationError: a cycle does not fit the staging memory; names the flag and its least value.
    """
    _check_tables(before_LE, after_LE, layouts, num_ranks)
    # Step 1: divide each layer's change into steps of whole cycles that fit the staging memory.
    steps: list[MigrationStep] = []
    for before_E, after_E, layout in zip(before_LE, after_LE, layouts, strict=True):
        steps += _plan_layer(before_E, after_E, layout, num_ranks, staging_bytes, max_chunk_bytes)
    # Step 2: count what each worker sends and receives.
    num_workers = num_ranks * (layouts[0].edp_size if layouts else 1)
    sent_W, received_W = (np.zeros(num_workers, dtype=np.int64) for _ in range(2))
    for moved in (step.transfers for step in steps):
        wire = moved.source != moved.target
        np.add.at(sent_W, moved.source[wire], moved.nbytes[wire])
        np.add.at(received_W, moved.target[wire], moved.nbytes[wire])
    # Step 3: a digest of everything that decides the plan, which ranks compare before they start.
    digest = hashlib.sha256(repr((before_LE.shape, num_ranks, staging_bytes, max_chunk_bytes)).encode())
    for part in (before_LE, after_LE):
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    for layout in layouts:
        digest.update(layout.digest)
    return MigrationPlan(
        steps=tuple(steps),
        sent_bytes_W=sent_W,
        received_bytes_W=received_W,
        digest=digest.hexdigest()[:16],
    )


def _check_tables(before_LE: IntArray, after_LE: IntArray, layouts: Sequence[LayerLayout], num_ranks: int) -> None:
    if before_LE.shape != after_LE.shape or len(before_LE) != len(layouts):
        raise PlanError(f"homes {before_LE.shape} and {after_LE.shape} for {len(layouts)} layers")
    for name, table_LE in (("before", before_LE), ("after", after_LE)):
        for row_E, layout in zip(table_LE, layouts, strict=True):
            slots = num_ranks * layout.home_slots
            if len(row_E) != slots or (np.sort(row_E) != np.arange(slots)).any():
                raise PlanError(f"homes {name}, layer {layout.layer}: not a permutation of {slots} slots")


def _plan_layer(
    before_E: IntArray, after_E: IntArray, layout: LayerLayout, num_ranks: int, staging_bytes: int, max_chunk: int
) -> list[MigrationStep]:
    """The steps of one layer: its transfers in batches of whole cycles."""
    moving = np.nonzero(before_E != after_E)[0]
    if not len(moving):
        return []
    transfers = transfers_of(moving, before_E[moving], after_E[moving], layout)
    num_workers = num_ranks * layout.edp_size
    incoming_EW = np.zeros((len(before_E), num_workers), dtype=np.int64)
    np.add.at(incoming_EW, (transfers.expert, transfers.target), transfers.nbytes)
    limit = staging_bytes * 3 // 4 - ALIGNMENT_BYTES * num_workers  # a quarter is kept for the two chunks
    steps = []
    for experts in _batches(_cycles(before_E, after_E), incoming_EW, limit, staging_bytes, layout.layer):
        moved = transfers.where(np.isin(transfers.expert, experts))
        steps.append(_step(layout.layer, experts, after_E, moved, num_workers, staging_bytes, max_chunk))
    return steps


def _cycles(before_E: IntArray, after_E: IntArray) -> list[list[int]]:
    """Experts that take each other's slots, cycle by cycle, by ascending smallest expert."""
    holder = np.argsort(before_E)  # expert in each global slot, now
    seen = before_E == after_E
    cycles = []
    for first in np.nonzero(~seen)[0]:
        cycle: list[int] = []
        expert = int(first)
        while not seen[expert]:
            seen[expert] = True
            cycle.append(expert)
            expert = int(holder[after_E[expert]])
        if cycle:
            cycles.append(cycle)
    return cycles


def _batches(
    cycles: list[list[int]], incoming_EW: IntArray, limit: int, staging_bytes: int, layer: int
) -> list[list[int]]:
    """Cycles put together while the busiest worker can stage what it receives."""
    batches: list[list[int]] = []
    load_W = np.full(incoming_EW.shape[1], limit + 1, dtype=np.int64)  # full: the first cycle opens a batch
    for cycle in cycles:
        cycle_W = incoming_EW[cycle].sum(axis=0)
        if cycle_W.max() > limit:
            needed_mib = -(-(int(cycle_W.max()) + ALIGNMENT_BYTES * len(cycle_W)) * 4 // 3 // 1024**2)
            raise MigrationError(
                f"layer {layer}: experts {', '.join(map(str, sorted(cycle)))} exchange their slots and must be "
                f"committed together, for which a rank needs {needed_mib} MiB of staging memory; {STAGING_FLAG} allows "
                f"{staging_bytes / 1024**2:g}. Raise it to at least {needed_mib}."
            )
        if (load_W + cycle_W).max() > limit:
            batches.append([])
            load_W = np.zeros_like(cycle_W)
        batches[-1] += cycle
        load_W = load_W + cycle_W
    return batches


def _step(
    layer: int,
    experts: list[int],
    after_E: IntArray,
    moved: Transfers,
    num_workers: int,
    staging_bytes: int,
    max_chunk: int,
) -> MigrationStep:
    """One step: its messages in rounds, and the chunk size that its staging memory allows."""
    messages = _messages(moved)
    incoming_W = np.zeros(num_workers, dtype=np.int64)
    for message in messages:
        incoming_W[message.target] += _aligned(message.nbytes)
    # Two chunks to send from take what the received messages leave of the staging memory.
    largest = max((_aligned(m.nbytes) for m in messages if m.source != m.target), default=0)
    room = (staging_bytes - int(incoming_W.max())) // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    chunk_bytes = min(max_chunk // ALIGNMENT_BYTES * ALIGNMENT_BYTES, room, largest)
    wire = tuple(message for message in messages if message.source != message.target)
    return MigrationStep(
        layer=layer,
        experts=tuple(experts),
        to_slot=tuple(int(after_E[expert]) for expert in experts),
        transfers=moved,
        messages=wire,
        rounds=_rounds(wire),
        chunk_bytes=chunk_bytes,
        staging_bytes=int(incoming_W.max()) + 2 * chunk_bytes,
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _messages(moved: Transfers) -> list[Message]:
    """One for each pair of workers, those of a worker to itself included; transfers are sorted by pair."""
    change = (np.diff(moved.source) != 0) | (np.diff(moved.target) != 0)
    bounds = [0, *(np.nonzero(change)[0] + 1).tolist(), len(moved)]
    return [
        Message(
            source=int(moved.source[first]),
            target=int(moved.target[first]),
            first=first,
            last=last,
            nbytes=int(moved.nbytes[first:last].sum()),
        )
        for first, last in itertools.pairwise(bounds)
    ]


def _rounds(messages: Sequence[Message]) -> tuple[tuple[int, ...], ...]:
    """Put the messages into rounds without conflicts: the longest first, each into the first round in which both its
    ends are free. That takes at most twice as many rounds as the busiest worker has messages."""
    order = sorted(range(len(messages)), key=lambda i: (-messages[i].nbytes, messages[i].source, messages[i].target))
    rounds: list[list[int]] = []
    sending: list[set[int]] = []
    receiving: list[set[int]] = []
    for index in order:
        message = messages[index]
        for at in range(len(rounds) + 1):
            if at == len(rounds):
                rounds.append([])
                sending.append(set())
                receiving.append(set())
            if message.source not in sending[at] and message.target not in receiving[at]:
                break
        rounds[at].append(index)
        sending[at].add(message.source)
        receiving[at].add(message.target)
    return tuple(tuple(members) for members in rounds)
