"""Where each rank is, in a few kilobytes of memory that outlive it: what it posted last, in which layer, since when.

A rank writes its own record, a word at a time, without a lock and without a system call. The process that started the
ranks holds the memory (`ProgressTable`), so it can read the record of a rank that computes, that is stopped, or that
was killed. The words are 64-bit integers, which the processors this runs on store whole; a reader that meets a change
half written sees it whole half a second later.

Nothing here imports torch: the launcher and the tests read records too.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

VARIABLE = "SMARTMOE_PROGRESS"  # environment variable of the ranks: the path of the table
RECORD_BYTES = 8192
MAX_GROUPS = 64  # process groups that a record counts one by one
TIMED_STEPS = 64  # the median step is that of the last steps, this many at most
LEAST_TIMED_STEPS = 3  # before there is a median
NO_PEER = -1
OPERATIONS = (
    "none",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "barrier",
    "send",
    "receive",
)
SENDS = frozenset({"send", "receive"})  # between two ranks, and so no operation of the whole group

_TABLE_NAME = "smartmoe-progress"
_MAGIC = 0x534D4F45_00000001  # the format, and its version
_NAME_BYTES = 40
_GROUP_WORDS = 3 + _NAME_BYTES // 8  # key, operations posted, ranks, name
_HEAD_WORDS = 32
GROUPS_AT = _HEAD_WORDS + TIMED_STEPS


class Phase(IntEnum):
    """What a rank is doing, as far as it concerns how long that may take."""

    STARTING = 1
    STEP = 2
    SAVE = 3
    EVALUATION = 4
    COMPILATION = 5
    CHANGES = 6  # of placement and settings, between two steps
    ENDING = 7


class Pass(IntEnum):
    """The direction in which the rank goes through its layers."""

    NONE = 0
    FORWARD = 1
    BACKWARD = 2


class Word(IntEnum):
    """Where each number lies in a record. Times are nanoseconds of CLOCK_MONOTONIC, which a host's processes share."""

    MAGIC = 0
    PID = 1
    STARTED_TICKS = 2  # of the process, as /proc/PID/stat has it: a pid can be given to another process
    RANK = 3
    FLOOR_NS = 4  # of the limit of a step
    STACK_SIGNAL = 5  # makes the process write its stacks; 0: it must not be sent any
    STACK_FILE = 6  # descriptor that the stacks are written to
    PHASE = 8
    BEGUN_NS = 9  # of the phase; later by every other phase that came between
    ITERATION = 10
    STEPS = 11  # begun so far
    POSTED = 12  # operations so far
    MOVED_NS = 13  # the last time that anything here changed
    OPERATION = 14  # index in OPERATIONS of the one that was posted last, or that is waited for
    GROUP = 15  # slot of its group
    NUMBER = 16  # of this operation among its group's, from 1
    PEER = 17  # rank at the other end of a send or a receive
    WAITING = 18  # 1: the host waits for it to complete
    WAITED_NS = 19  # by the host, in this step
    LAYER = 20  # from 1; 0: outside the layers
    PASS = 21


class ProgressTable:
    """Memory for the records of one node's ranks: no file, so nothing is left behind however the job ends.

    Args:
        num_ranks: ranks on this node.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._descriptor = os.memfd_create(_TABLE_NAME)
        os.ftruncate(self._descriptor, num_ranks * RECORD_BYTES)
        self._memory = mmap.mmap(self._descriptor, num_ranks * RECORD_BYTES)

    @property
    def path(self) -> str:
        """What another process of this user opens, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self) -> list[RankProgress]:
        """Every record that a rank has begun, by rank."""
        return read_records(self._memory[:])

    @staticmethod
    def path_in(pid: int) -> str | None:
        """The path of the table that another process holds, for tools that look at a run from outside."""
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{descriptor}"
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(path).startswith(f"/memfd:{_TABLE_NAME}"):
                    return path
        return None

    def close(self) -> None:
        """Give the memory back once the ranks have too."""
        self._memory.close()
        os.close(self._descriptor)


def read_records(table: bytes) -> list[RankProgress]:
    """The records of a table's bytes, by rank; those that no rank has begun are left out."""
    now_ns = time.monotonic_ns()
    records = (table[start : start + RECORD_BYTES] for start in range(0, len(table), RECORD_BYTES))
    found = [progress for record in records if (progress := RankProgress.from_bytes(record, now_ns)) is not None]
    return sorted(found, key=lambda progress: progress.rank)


@dataclass(frozen=True, kw_only=True)
class GroupProgress:
    """How far one rank is in one process group.

    Attributes:
        key: the same on every rank of the group.
        name: as Megatron describes it; empty if it does not.
        posted: collective operations that this rank has posted.
        size: ranks of the group.
    """

    key: int
    name: str
    posted: int
    size: int


@dataclass(frozen=True, kw_only=True)
class RankProgress:
    """A record as it was at one moment; ages are seconds before it.

    Attributes:
        rank: in the whole job.
        pid: of its process.
        started_ticks: when the process began, see proc(5).
        phase: what it is doing.
        iteration: the current one; 0 before the first.
        steps: steps begun by this process.
        phase_s: time in this phase, other phases in between left out.
        still_s: time since anything changed.
        posted: operations so far.
        operation: one of OPERATIONS: the one that is waited for, else the one that was posted last.
        group_key: of its group; 0 if there is none.
        group_name: of its group.
        number: of the operation among its group's.
        peer: the rank at the other end, or NO_PEER.
        is_waiting: whether the host waits for the operation to complete.
        waited_s: time that the host has waited in this step, the present wait included.
        layer: from 1; 0 outside the layers.
        direction: forward or backward pass.
        median_step_s: of the last steps; None before there are LEAST_TIMED_STEPS.
        floor_s: added to a multiple of the median step.
        stack_signal: makes the process write its stacks; 0: none does.
        stack_file: descriptor that it writes them to.
        groups: by key, the process groups that this rank has used.
    """

    rank: int
    pid: int
    started_ticks: int
    phase: Phase
    iteration: int
    steps: int
    phase_s: float
    still_s: float
    posted: int
    operation: str
    group_key: int
    group_name: str
    number: int
    peer: int
    is_waiting: bool
    waited_s: float
    layer: int
    direction: Pass
    median_step_s: float | None
    floor_s: float
    stack_signal: int
    stack_file: int
    groups: dict[int, GroupProgress] = field(repr=False)

    @classmethod
    def from_bytes(cls, record: bytes, now_ns: int) -> RankProgress | None:
        """Read a record; None if no rank has begun it."""
        words = struct.unpack_from(f"<{GROUPS_AT}q", record)
        if words[Word.MAGIC] != _MAGIC:
            return None
        slots = list(_groups(record))
        group = slots[words[Word.GROUP]] if words[Word.GROUP] < len(slots) else None
        moved_s = max(0.0, (now_ns - words[Word.MOVED_NS]) / 1e9)
        is_waiting = bool(words[Word.WAITING])
        return cls(
            rank=words[Word.RANK],
            pid=words[Word.PID],
            started_ticks=words[Word.STARTED_TICKS],
            phase=Phase(words[Word.PHASE]),
            iteration=words[Word.ITERATION],
            steps=words[Word.STEPS],
            phase_s=max(0.0, (now_ns - words[Word.BEGUN_NS]) / 1e9),
            still_s=moved_s,
            posted=words[Word.POSTED],
            operation=OPERATIONS[words[Word.OPERATION]],
            group_key=group.key if group is not None else 0,
            group_name=group.name if group is not None else "",
            number=words[Word.NUMBER],
            peer=words[Word.PEER],
            is_waiting=is_waiting,
            waited_s=words[Word.WAITED_NS] / 1e9 + (moved_s if is_waiting else 0.0),
            layer=words[Word.LAYER],
            direction=Pass(words[Word.PASS]),
            median_step_s=_median_step_s(words),
            floor_s=words[Word.FLOOR_NS] / 1e9,
            stack_signal=words[Word.STACK_SIGNAL],
            stack_file=words[Word.STACK_FILE],
            groups={group.key: group for group in slots},
        )

    @property
    def place(self) -> str:
        """`iteration 41, layer 3, backward pass, waits in an all-to-all (expert model parallel group)`."""
        parts = [f"iteration {self.iteration}"] if self.iteration else []
        return ", ".join([*parts, self.place_in_iteration])

    @property
    def place_in_iteration(self) -> str:
        """The same without the iteration."""
        parts = [_PHASE_TEXTS[self.phase]] if self.phase is not Phase.STEP else []
        if self.layer:
            parts.append(f"layer {self.layer}")
        if self.direction is not Pass.NONE and self.layer:
            parts.append(f"{self.direction.name.lower()} pass")
        if self.operation != "none":
            parts.append(self._operation)
        return ", ".join(parts) or "no collective yet"

    @property
    def _operation(self) -> str:
        article = "an" if self.operation[0] == "a" else "a"
        text = f"{'waits in' if self.is_waiting else 'after'} {article} {self.operation}"
        if self.peer != NO_PEER:
            text += f" {'to' if self.operation == 'send' else 'from'} rank {self.peer}"
        return f"{text} ({self.group_name})" if self.group_name else text


_PHASE_TEXTS = {
    Phase.STARTING: "starting",
    Phase.SAVE: "saving a checkpoint",
    Phase.EVALUATION: "evaluating",
    Phase.COMPILATION: "compiling",
    Phase.CHANGES: "re-evaluating expert placement",
    Phase.ENDING: "ending",
}


def _groups(record: bytes) -> Iterator[GroupProgress]:
    for slot in range(MAX_GROUPS):
        start = 8 * (GROUPS_AT + slot * _GROUP_WORDS)
        key, posted, size, name = struct.unpack_from(f"<qqq{_NAME_BYTES}s", record, start)
        if not key:  # slots are filled in their order
            return
        yield GroupProgress(key=key, name=name.rstrip(b"\0").decode(errors="replace"), posted=posted, size=size)


def _median_step_s(words: tuple[int, ...]) -> float | None:
    timed = min(words[Word.STEPS] - 2, TIMED_STEPS)  # neither the first step nor the present one is
    return statistics.median(words[_HEAD_WORDS : _HEAD_WORDS + timed]) / 1e9 if timed >= LEAST_TIMED_STEPS else None


class ProgressRecord:
    """One rank's own record, which it writes.

    Args:
        table: path of the node's table.
        local_rank: which record of it.
        rank: in the whole job.
        floor_s: of the limit of a step.

    Attributes:
        words: the record as 64-bit integers; what posts operations writes to them directly, because it counts in
            nanoseconds.
    """

    def __init__(self, table: str, local_rank: int, *, rank: int, floor_s: float) -> None:
        self.words = words = self.words_of(table, local_rank)
        for index in range(len(words)):
            words[index] = 0
        self._num_groups = 0
        now = time.monotonic_ns()
        words[Word.PID], words[Word.STARTED_TICKS] = os.getpid(), started_ticks(os.getpid()) or 0
        words[Word.RANK], words[Word.FLOOR_NS] = rank, round(floor_s * 1e9)
        words[Word.PEER] = NO_PEER
        words[Word.PHASE], words[Word.BEGUN_NS], words[Word.MOVED_NS] = Phase.STARTING, now, now
        words[Word.MAGIC] = _MAGIC  # last: now it is a record

    @staticmethod
    def words_of(table: str, local_rank: int) -> memoryview[int]:
        """The words of a record, as they are."""
        with open(table, "r+b") as file:
            memory = mmap.mmap(file.fileno(), RECORD_BYTES, offset=local_rank * RECORD_BYTES)
        return memoryview(memory).cast("q")

    def accept_stack_signal(self, number: int, descriptor: int) -> None:
        """The process now writes its stacks to `descriptor` when it gets signal `number`."""
        self.words[Word.STACK_FILE] = descriptor
        self.words[Word.STACK_SIGNAL] = number

    def add_group(self, key: int, name: str, size: int) -> int:
        """A slot for a process group; the groups beyond MAX_GROUPS share the last one, which names none of them."""
        slot = min(self._num_groups, MAX_GROUPS - 1)
        if self._num_groups >= MAX_GROUPS:
            key, name, size = _SHARED_KEY, "", 0
        self._num_groups += 1
        start = GROUPS_AT + slot * _GROUP_WORDS
        padded = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        for offset, word in enumerate(struct.unpack(f"<{_NAME_BYTES // 8}q", padded)):
            self.words[start + 3 + offset] = word
        self.words[start + 2] = size
        self.words[start] = key
        return slot

    def begin_step(self, iteration: int) -> None:
        """The step before it, if it was not the first, has been timed now."""
        words, now = self.words, time.monotonic_ns()
        if words[Word.STEPS] >= 2:
            words[_HEAD_WORDS + (words[Word.STEPS] - 2) % TIMED_STEPS] = now - words[Word.BEGUN_NS]
        words[Word.BEGUN_NS] = words[Word.MOVED_NS] = now
        words[Word.STEPS] += 1
        words[Word.ITERATION] = iteration
        words[Word.WAITED_NS] = 0
        words[Word.LAYER] = words[Word.PASS] = 0
        words[Word.PHASE] = Phase.STEP

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """A phase inside another one, whose own time does not go on meanwhile."""
        words, entered = self.words, time.monotonic_ns()
        outer, begun = words[Word.PHASE], words[Word.BEGUN_NS]
        self.enter(phase)
        try:
            yield
        finally:
            now = time.monotonic_ns()
            words[Word.BEGUN_NS], words[Word.MOVED_NS] = begun + now - entered, now
            words[Word.PHASE] = outer

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        self.words[Word.PHASE] = phase
        self.words[Word.BEGUN_NS] = self.words[Word.MOVED_NS] = time.monotonic_ns()
        self.words[Word.LAYER] = self.words[Word.PASS] = 0


_SHARED_KEY = -1


def group_posted_word(slot: int) -> int:
    """Index of the word that counts the operations of the group in `slot`."""
    return GROUPS_AT + slot * _GROUP_WORDS + 1


def started_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since the host did; None if there is no such process."""
    stat = process_stat(pid)
    return int(stat[19]) if stat is not None else None


def process_state(pid: int) -> str | None:
    """R runs, S sleeps, D waits for a disk, T (signal) or t (debugger) is stopped, Z has ended; None: no process."""
    stat = process_stat(pid)
    return stat[0] if stat is not None else None


def process_stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field, the state, on; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()  # the second field is a name, which may contain anything
    except (FileNotFoundError, ProcessLookupError):
        return None
