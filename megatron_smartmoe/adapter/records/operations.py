"""Every operation of every process group, noted in the rank's progress record as it is posted and waited for.

torch's functions (`all_reduce`, `isend`, `batch_isend_irecv`, those that move Python objects), Megatron's autograd
functions in both passes and this project's own exchanges all end in a method of `ProcessGroup` and, where the host
waits, in `Work.wait`. Both are looked up on the class at every call, so wrapping them there misses none of them, no
matter which module imported which function before. The alternative, wrapping the functions of `torch.distributed`,
would miss the names that Megatron binds at import.

An operation costs about a microsecond more (docs/reliability.md has the measurement), so a wrapper writes words of the
record directly and looks a group up by its identity.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Work

from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.runtime.progress import (
    NO_PEER,
    OPERATIONS,
    SENDS,
    ProgressRecord,
    Word,
    group_posted_word,
)

_METHODS = {  # of ProcessGroup, by what they do
    "all-reduce": ("allreduce", "allreduce_coalesced"),
    "all-gather": ("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    "reduce-scatter": ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    "all-to-all": ("alltoall", "alltoall_base"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "barrier": ("barrier", "monitored_barrier"),
    "send": ("send",),
    "receive": ("recv", "recv_anysource"),
}
_NAMELESS = ("undefined", "")  # what torch calls a group that nobody described

# Plain integers: an IntEnum as an index costs as much as the rest of a line.
_POSTED, _MOVED, _OPERATION, _GROUP, _NUMBER, _PEER, _WAITING, _WAITED = map(
    int,
    (
        Word.POSTED,
        Word.MOVED_NS,
        Word.OPERATION,
        Word.GROUP,
        Word.NUMBER,
        Word.PEER,
        Word.WAITING,
        Word.WAITED_NS,
    ),
)


class Operations:
    """Notes what process groups do in a record, from `install` on to the end of the process.

    Args:
        record: this rank's.
    """

    def __init__(self, record: ProgressRecord) -> None:
        self._record = record
        self._groups: dict[int, tuple[int, int, list[int]]] = {}  # id of a group -> slot, its counter's word, ranks
        # id of a Work -> the operation as the record has it. An id is used again once a Work is gone, and by then its
        # entry says nothing: the next operation that gets the id replaces it.
        self._in_flight: dict[int, tuple[int, int, int, int]] = {}

    def install(self) -> None:
        """Begin.

        Raises:
            CompatError: this torch has process groups without one of the methods.
        """
        for operation, methods in _METHODS.items():
            code = OPERATIONS.index(operation)
            for method in methods:
                wrap = self.sending if operation in SENDS else self.posting
                self._replace(dist.ProcessGroup, method, functools.partial(wrap, code))
        self._replace(Work, "wait", self.waiting)

    def forget(self) -> None:
        """Drop what is known of operations that nobody will wait for any more: a step has ended."""
        self._in_flight.clear()

    def _replace(self, owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name, None)
        if original is None:
            rule = f"{owner.__name__}.{name} = missing: the watchdog notes its calls, and this torch does not have it."
            raise CompatError(f"{rule} Pass --smartmoe-watchdog off, or use torch 2.11.")
        setattr(owner, name, functools.wraps(original)(wrap(original)))

    def posting(self, code: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """The method of a collective, with a note.

        Args:
            code: its index in OPERATIONS.
            original: torch's method.
        """
        words, groups, in_flight, now = self._record.words, self._groups, self._in_flight, time.monotonic_ns

        def post(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            entry = groups.get(id(group))
            if entry is None:
                entry = self._add(group)
            slot, counter, _ = entry
            number = words[counter] + 1
            words[counter] = number
            words[_OPERATION], words[_GROUP], words[_NUMBER], words[_PEER] = code, slot, number, NO_PEER
            words[_POSTED] += 1
            words[_MOVED] = now()
            work = original(group, *args, **kwargs)
            in_flight[id(work)] = (code, slot, number, NO_PEER)
            return work

        return post

    def sending(self, code: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """The method of a send or a receive, with a note; see `posting`."""
        words, groups, in_flight, now = self._record.words, self._groups, self._in_flight, time.monotonic_ns

        def post(group: dist.ProcessGroup, tensors: Any, peer: int, *args: Any, **kwargs: Any) -> Any:
            entry = groups.get(id(group))
            if entry is None:
                entry = self._add(group)
            slot, _, ranks = entry
            # `recv_anysource` has a tag in the place of the peer, and nothing behind it
            other = ranks[peer] if args or kwargs else NO_PEER
            words[_OPERATION], words[_GROUP], words[_NUMBER], words[_PEER] = code, slot, 0, other
            words[_POSTED] += 1
            words[_MOVED] = now()
            work = original(group, tensors, peer, *args, **kwargs)
            in_flight[id(work)] = (code, slot, 0, other)
            return work

        return post

    def waiting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`Work.wait`, with a note."""
        words, in_flight, now = self._record.words, self._in_flight, time.monotonic_ns

        def wait(work: Work, *args: Any, **kwargs: Any) -> Any:
            operation = in_flight.pop(id(work), None)
            if operation is not None:
                words[_OPERATION], words[_GROUP], words[_NUMBER], words[_PEER] = operation
            began = now()
            words[_MOVED] = began
            words[_WAITING] = 1
            try:
                return original(work, *args, **kwargs)
            finally:
                ended = now()
                words[_WAITING] = 0
                words[_WAITED] += ended - began
                words[_MOVED] = ended

        return wait

    def _add(self, group: dist.ProcessGroup) -> tuple[int, int, list[int]]:
        """Give a group a slot of the record, with the name that Megatron gave it."""
        described = "all ranks" if group is dist.group.WORLD else str(group.group_desc)
        name = "" if described in _NAMELESS else described.lower().replace("_", " ")
        key = zlib.crc32(str(group.group_name).encode()) + 1  # torch numbers groups alike on all ranks; 0 is no key
        slot = self._record.add_group(key, name, group.size())
        entry = (slot, group_posted_word(slot), dist.get_process_group_ranks(group))
        self._groups[id(group)] = entry
        return entry
