"""What training does not wait for in a save: digests, checksums, the manifest, and the tracker.

When Megatron has written the files, a thread on every rank finishes the save while training goes on:

1. It computes the digests, while the next forward and backward passes run. They read weights and optimizer state, which
   only the optimizer changes; its step waits for them (`Finishing.wait_for_digests`).
2. It computes the checksums of the files that the rank has written, and sends both to rank 0.
3. On rank 0 it writes the manifest and moves the tracker, and sends the others the outcome.

What is sent goes through the key-value store of the process groups, over a connection of its own. With collectives
the training would have to ask in every step whether all ranks are ready, and call them in the same step on all. This
way the checkpoint is in force as soon as it can be, and a rank whose training has ended by an exception still adds its
part. Only who needs the outcome, such as the next save, waits for it, on all ranks alike (`Finishing.wait`).
"""

from __future__ import annotations

import pickle
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_smartmoe.adapter.checkpoint.digests import DigestPart, LocalDigests, combined
from megatron_smartmoe.adapter.checkpoint.manifests import manifest_of, own_entries
from megatron_smartmoe.adapter.checkpoint.problems import reason
from megatron_smartmoe.checkpoint.directory import folder_of, write_tracker
from megatron_smartmoe.checkpoint.manifest import FORMATS, FileEntry, write_manifest
from megatron_smartmoe.errors import SmartMoEError

_AS_LONG_AS_IT_TAKES = timedelta(days=30)  # whoever is waited for ends the wait by ending itself
_AFTER_AN_EXCEPTION_S = 5.0


@dataclass(kw_only=True)
class Save:
    """A save under way.

    Attributes:
        iteration: that it saves.
        directory: of the checkpoints, with the tracker.
        arguments: of the run, for the manifest.
        is_async: whether training goes on while files are written.
        began_s: when it began, by `time.perf_counter`.
        digests: of what this rank holds; None if they cannot be computed.
        problem: what went wrong on this rank, empty if nothing has.
    """

    iteration: int
    directory: Path
    arguments: Namespace
    is_async: bool
    began_s: float
    digests: LocalDigests | None = None
    problem: str = ""

    @property
    def folder(self) -> Path:
        """Of the iteration."""
        return folder_of(self.directory, self.iteration)

    def note(self, error: BaseException) -> None:
        """Keep the first thing that went wrong on this rank."""
        self.problem = self.problem or reason(error)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a rank sends to rank 0.

    Attributes:
        problem: what went wrong there, empty if nothing has.
        entries: of the files that it is responsible for.
        digests: what it adds to them; a text that says why it can add nothing.
    """

    problem: str
    entries: list[FileEntry]
    digests: DigestPart | str


class Finishing:
    """The thread that finishes a save, on this rank.

    Args:
        save: what it finishes.
        number: of the save, the same on all ranks.
        ended: called by the thread on rank 0, with this object and what went wrong, or nothing.

    Attributes:
        is_whole: whether the checkpoint is complete; the tracker names it, or is moved by what waits in `then`.
        lacks: on rank 0: why the manifest has no digests, empty if it has them.
    """

    def __init__(self, save: Save, number: int, ended: Callable[[Finishing, str], None]) -> None:
        self.save, self.is_whole, self.lacks = save, False, ""
        self._ended, self._prefix = ended, f"smartmoe/save/{number}"
        self._lock, self._later = threading.Lock(), list[Callable[[], Any]]()
        self._written, self._has_sent = threading.Event(), threading.Event()
        self._is_given_up, self._verdict = False, ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save {save.iteration}", daemon=True)

    def begin(self) -> None:
        """Compute the digests from now on; what they read stays as it is until `wait_for_digests` returns."""
        if self._thread.ident is None:
            self._thread.start()

    def go_on(self) -> None:
        """All ranks have written their files."""
        self.begin()
        self._written.set()

    def give_up(self) -> None:
        """The files could not be written, on all ranks alike."""
        self._is_given_up = True
        self._written.set()

    def then(self, act: Callable[[], Any]) -> None:
        """Call `act` when the checkpoint is whole, or never; at once if it is."""
        with self._lock:
            if not self.is_whole:
                self._later.append(act)
                return
        act()

    def wait_for_digests(self) -> None:
        """Return when what the digests are computed of may change."""
        if self.save.digests is not None and self._thread.ident is not None:
            self.save.digests.wait()

    @property
    def is_written(self) -> bool:
        """Whether all ranks have written their files; the same on all ranks."""
        return self._written.is_set()

    def wait(self) -> str:
        """Return what went wrong, or nothing, when the save is over. A collective call of all ranks.

        A rank that is gone is noticed by the collectives.

        Raises:
            SmartMoEError: a rank could not send or receive; on all ranks alike.
        """
        self._has_sent.wait()
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, "" if self._error is None else reason(self._error))
        if not any(problems):  # rank 0 has what it needs to go on alone
            if dist.get_rank() == 0:
                self._thread.join()
            own = "" if self._error is None else reason(self._error)
            outcome = [([own], self._verdict)]
            dist.broadcast_object_list(outcome, src=0)
            problems, self._verdict = outcome[0]
        for rank, problem in enumerate(problems):
            if problem:
                what = f"the save of iteration {self.save.iteration} could not be finished on rank {rank}: {problem}"
                raise SmartMoEError(what) from self._error
        self._thread.join()
        return self._verdict

    def wait_alone(self) -> None:
        """Give a save whose files are written a moment to be finished, though an exception has ended the training."""
        if self._written.is_set():
            self._thread.join(_AFTER_AN_EXCEPTION_S)

    # --- The thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            digests = self._digest()
            self._written.wait()
            if not self._is_given_up:
                self._finish(digests)
        except BaseException as error:  # raised where the outcome is asked for
            self._error = error
        finally:
            self._has_sent.set()

    def _digest(self) -> DigestPart | str:
        """This rank's part of the digests, or why it has none."""
        if self.save.digests is None:
            return "this model has none"
        try:
            self.save.digests.compute()
            return self.save.digests.part()
        except Exception as error:  # a checkpoint without digests is one all the same
            return f"{type(error).__name__}: {error}"

    def _finish(self, digests: DigestPart | str) -> None:
        own, store, rank = self._own_part(digests), _connection(), dist.get_rank()
        if rank:
            store.set(f"{self._prefix}/{rank}", pickle.dumps(own))
            self._has_sent.set()
            self._verdict = _received(store, self._prefix).decode()
        else:
            self._has_sent.set()
            parts = [own]
            for other in range(1, dist.get_world_size()):
                key = f"{self._prefix}/{other}"
                parts.append(pickle.loads(_received(store, key)))
                store.delete_key(key)
            self.lacks = next((part.digests for part in parts if isinstance(part.digests, str)), "")
            self._verdict = _put_in_force(self.save, parts)
            store.set(self._prefix, self._verdict)
        if not self._verdict:
            self._act_later()
        if rank == 0:
            self._ended(self, self._verdict)

    def _own_part(self, digests: DigestPart | str) -> _Part:
        """Computes the checksums."""
        save, entries = self.save, list[FileEntry]()
        if save.arguments.ckpt_format in FORMATS:
            try:
                entries = own_entries(
                    save.folder, save.arguments.ckpt_format, dist.get_rank(), dist.get_world_size()
                )  # fmt: skip
            except OSError as error:
                save.note(error)
        return _Part(problem=save.problem, entries=entries, digests=digests)

    def _act_later(self) -> None:
        with self._lock:
            self.is_whole = True
        for act in self._later:
            act()


def _connection() -> Any:
    """A connection to the store that no other thread waits in."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def _received(store: Any, key: str) -> bytes:
    """The value of a key, as soon as it has one."""
    store.wait([key], _AS_LONG_AS_IT_TAKES)
    return bytes(store.get(key))


def _put_in_force(save: Save, parts: list[_Part]) -> str:
    """On rank 0: the manifest, then the tracker; what went wrong, or nothing."""
    for rank, part in enumerate(parts):
        if part.problem:
            return f"{part.problem} (rank {rank})"
    try:
        if save.arguments.ckpt_format in FORMATS:
            digests = [part.digests for part in parts if isinstance(part.digests, DigestPart)]
            entries = [entry for part in parts for entry in part.entries]
            numbers = combined(digests) if len(digests) == len(parts) else ()
            write_manifest(save.folder, manifest_of(save.folder, save.iteration, save.arguments, entries, numbers))
        if not save.is_async:  # otherwise Megatron's own functions write it, which wait in `then`
            write_tracker(save.directory, save.iteration)
    except Exception as error:  # the other ranks wait for this one, whatever it is
        return reason(error)
    return ""
