"""Saves that lose nothing: a manifest for every checkpoint, and no failed save that ends training.

A checkpoint is in force when the tracker names it. Around Megatron's own save:

1. What has been saved already is not saved again; an interrupted save's folder is removed before it is written anew.
2. Digests of what each rank holds are computed while Megatron writes (`digests`), and no longer: then experts may move.
3. Each rank computes the checksums of the files that it writes while it writes them, where Megatron lets it see what
   is written (torch_dist), else by reading them again.
4. Rank 0 writes the manifest, and only then does the tracker name the checkpoint.

A save that fails (a full disk, a folder that cannot be written) is abandoned on all ranks alike: its folder is removed,
the checkpoint before it stays in force, one line says so, and training continues.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import threading
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smartmoe import __version__
from megatron_smartmoe.adapter.checkpoint import tracker
from megatron_smartmoe.adapter.checkpoint.digests import DigestReduction, LocalDigests
from megatron_smartmoe.adapter.checkpoint.folders import save_directory
from megatron_smartmoe.adapter.checkpoint.held import held_tensors
from megatron_smartmoe.adapter.checkpoint.writer import PART, SHARDS, WithChecksums, checksum_of_written
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.launch.secrets import secrets_among
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.checkpoint.directory import folder_of, iteration_of, read_tracker, write_tracker
from megatron_smartmoe.checkpoint.inspection import readable_bytes
from megatron_smartmoe.checkpoint.manifest import (
    FORMATS,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    write_manifest,
)
from megatron_smartmoe.checkpoint.resume import newest_whole
from megatron_smartmoe.errors import CheckpointError, SmartMoEError
from megatron_smartmoe.spec.secrets import MASK

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # its errors are about itself, and not about the disk
_SOFTWARE = ("megatron-core", "torch", "numpy")  # whose versions a manifest names


class SaveFailed(SmartMoEError):
    """A checkpoint could not be written; raised on all ranks alike."""


@dataclass(kw_only=True)
class _Save:
    """A save under way.

    Attributes:
        iteration: that it saves.
        directory: of the checkpoints, with the tracker.
        digests: of what this rank holds, being computed; None if they cannot be.
        arguments: of the run, for the manifest.
        is_async: whether training goes on while files are written.
        problem: what went wrong on this rank, empty if nothing has.
        is_over: set when it is known whether the checkpoint is whole.
        is_whole: whether it is.
    """

    iteration: int
    directory: Path
    digests: LocalDigests | None
    arguments: Namespace
    is_async: bool
    problem: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)
    is_whole: bool = False

    @property
    def folder(self) -> Path:
        """Of the iteration."""
        return folder_of(self.directory, self.iteration)

    def note(self, error: BaseException) -> None:
        """Keep the first thing that went wrong on this rank."""
        self.problem = self.problem or _reason(error)


class CheckpointSaves(Callback):
    """Megatron's saves, with all that this project adds to them; `hooks.attach_checkpoints` puts it around them.

    Attributes:
        failed_at: iteration of the last save if that failed; None if it succeeded.
    """

    order: ClassVar[Order] = Order.CHECKPOINT

    def __init__(self) -> None:
        self._run: Run | None = None
        self._reduction = DigestReduction()
        self._tracker: tracker.AtomicTracker | None = None
        self._current: _Save | None = None  # within Megatron's call
        self._latest: _Save | None = None
        self._pending: deque[_Save] = deque()  # asynchronous ones, oldest first
        self._saved: tuple[Path, int] | None = None  # directory and iteration of what this run's state was saved as
        self._said = ""  # what the digests lack, as it was said last
        self.failed_at: int | None = None

    def on_start(self, run: Run) -> None:
        """Note which checkpoint the run's state was loaded from."""
        self._run = run
        if run.loaded_folder is not None:
            self._saved = run.loaded_folder.parent.resolve(), run.args.iteration

    def on_end(self) -> None:
        """A run whose last save failed does not end as if all were well."""
        if self.failed_at is not None:
            self._say(self.failed_at, "WARNING: the last save failed: what was trained since the one before it is lost")

    # --- What `hooks.attach_checkpoints` puts around Megatron's functions -----------------------------------------

    def around_files(self, files: Any) -> Any:
        """What Megatron opens a checkpoint's files through, with a tracker that moves on in one step."""
        self._tracker = tracker.AtomicTracker(files, self._tracker_failed)
        return self._tracker

    def around_save_checkpoint(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Around the training loop's `save_checkpoint`."""

        @functools.wraps(save_checkpoint)
        def guarded(iteration: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> Any:
            call = functools.partial(
                save_checkpoint, iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs
            )  # fmt: skip
            run = self._run
            if run is None:  # Megatron converts a checkpoint
                return call()
            directory = save_directory(run.args, non_persistent=non_persistent_ckpt)
            if directory is None:
                return call()
            if self._saved == (directory.resolve(), iteration):
                self._say(iteration, f"checkpoint: {directory} has this iteration already, and it is left as it is")
                return None
            return self._save(call, iteration, directory, run)

        return guarded

    def around_dist_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Around `dist_checkpointing.save`: have an asynchronous writer compute checksums, and end in a manifest."""

        @functools.wraps(save)
        def with_checksums(*args: Any, **kwargs: Any) -> Any:
            request, current = save(*args, **kwargs), self._current
            if request is None or current is None:
                return request
            if request.async_fn is not None:
                writer = WithChecksums(request.async_fn, str(current.folder), dist.get_rank())
                request = request._replace(async_fn=writer)
            self._pending.append(current)
            request.finalize_fns.append(functools.partial(self._finish, current))
            return request

        return with_checksums

    def around_finalize(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        """Around the training loop's `maybe_finalize_async_save`: a failed save does not end training."""

        @functools.wraps(finalize)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    return finalize(*args, **kwargs)
                except (SaveFailed, CheckpointException) as error:
                    if not self._pending:
                        raise
                    self._abandon(self._pending.popleft(), error)

        return guarded

    def around_delete(self, delete: Callable[..., Any]) -> Callable[..., Any]:
        """Around the deletion of the checkpoint before (`--save-retain-interval`): not before the new one is whole."""

        @functools.wraps(delete)
        def when_whole(*args: Any, **kwargs: Any) -> Any:
            latest = self._latest
            if latest is not None and not latest.is_async:
                latest.is_over.wait()
                if not latest.is_whole:
                    return None
            return delete(*args, **kwargs)

        return when_whole

    def recorded(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Around a function that one rank writes a file with, while the others wait: its failure is that of the save,
        later and on all ranks."""

        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            save = self._current or (self._pending[0] if self._pending else None)
            if save is None:
                return write(*args, **kwargs)
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                save.note(error)
                return None

        return attempt

    def recorded_if_legacy(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Like `recorded`, in saves of the legacy format alone: `torch.save` writes parts of others' files as well."""
        attempt = self.recorded(write)

        @functools.wraps(write)
        def choose(*args: Any, **kwargs: Any) -> Any:
            is_legacy = self._current is not None and self._current.arguments.ckpt_format == "torch"
            return (attempt if is_legacy else write)(*args, **kwargs)

        return choose

    def noted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Around the function that writes a shard: what went wrong, which Megatron's own report leaves out."""

        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            if self._current is not None and isinstance(result[1], Exception):
                self._current.note(result[1])
            return result

        return attempt

    # --- One save -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def digesting(self) -> Iterator[None]:
        """Within Megatron's save, after all that other callbacks do before it and before what they do after it: the
        digests are computed of tensors that stay where they are (formats that save slots have moved experts home)."""
        save, run = self._current, self._run
        if save is None or run is None:
            yield
            return
        save.digests = self._start_digests(save, run)
        try:
            yield
        finally:
            if save.digests is not None and not save.is_async:
                save.digests.wait()

    def _save(self, call: Callable[[], Any], iteration: int, directory: Path, run: Run) -> Any:
        """Save, or abandon the save on all ranks."""
        args = run.args
        save = _Save(
            iteration=iteration, directory=directory, digests=None, arguments=args, is_async=bool(args.async_save)
        )  # fmt: skip
        # Step 1: a folder without leftovers, on a file system that can be written.
        problem = [_prepare(save) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            return self._abandon(save, SaveFailed(problem[0]))
        # Step 2: Megatron's save, while the digests are computed.
        assert self._tracker is not None
        self._current = self._latest = save
        self._tracker.is_held = not save.is_async
        try:
            result = call()
            if not save.is_async:
                self._finish(save)
        except (SaveFailed, CheckpointException) as error:
            return self._abandon(save, error)
        finally:
            self._current, self._tracker.is_held = None, False
            if not save.is_async:
                save.is_over.set()
        return result

    def _start_digests(self, save: _Save, run: Run) -> LocalDigests | None:
        """Start to compute what this rank adds to the digests."""
        if run.args.ckpt_format not in FORMATS:
            return None
        beside: Literal["thread", "process"] = "process" if save.is_async else "thread"
        try:
            held, skipped = held_tensors(run.chunks, None if run.args.no_save_optim else run.optimizer)
            local = LocalDigests(held, run.args.num_experts or 0, beside=beside)
        except Exception as error:  # a model that cannot be described is saved all the same
            local, skipped = None, f"this model ({type(error).__name__}: {error})"
        if skipped and skipped != self._said:
            self._said = skipped
            self._say(save.iteration, f"checkpoint: the manifest has no digests of {skipped}")
        return local

    def _finish(self, save: _Save) -> None:
        """Write the manifest and put the checkpoint in force. A collective call of all ranks.

        Raises:
            SaveFailed: on all ranks, if anything has gone wrong on one of them.
        """
        own: list[FileEntry] = []
        try:
            own = _own_entries(save)
        except OSError as error:
            save.note(error)
        lacking = _lacking(save)
        is_new = save.digests is not None and self._reduction.is_new(save.digests)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (save.problem, own, is_new, lacking))
        for rank, (problem, *_) in enumerate(gathered):
            if problem:
                raise SaveFailed(f"{problem} (rank {rank})")
        digests: tuple[Any, ...] = ()
        if save.digests is not None and not any(of_rank[3] for of_rank in gathered):
            digests = self._reduction.reduce(save.digests, any_is_new=any(of_rank[2] for of_rank in gathered))
        verdict = [""]
        if dist.get_rank() == 0:
            verdict = [self._commit(save, [entry for of_rank in gathered for entry in of_rank[1]], digests)]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0]:
            raise SaveFailed(verdict[0])
        save.is_whole = True
        if save in self._pending:
            self._pending.remove(save)
        self._saved, self.failed_at = (save.directory.resolve(), save.iteration), None

    def _commit(self, save: _Save, entries: list[FileEntry], digests: tuple[Any, ...]) -> str:
        """On rank 0: the manifest, then the tracker; what went wrong, or nothing."""
        try:
            if save.arguments.ckpt_format in FORMATS:
                write_manifest(save.folder, _manifest(save, entries, digests))
            if not save.is_async:  # otherwise Megatron writes the tracker next
                write_tracker(save.directory, save.iteration)
        except Exception as error:  # the other ranks wait for this one, whatever it is
            return _reason(error)
        return ""

    def _abandon(self, save: _Save, error: BaseException) -> None:
        """Give a save up, on all ranks."""
        self.failed_at = save.iteration
        dist.barrier()  # no rank writes any more
        if dist.get_rank() == 0:
            reason = str(error) if isinstance(error, SaveFailed) else save.problem or _reason(error)
            free = shutil.disk_usage(save.directory).free if save.directory.is_dir() else 0
            room = f"{readable_bytes(free)} are free there"
            self._say(save.iteration, f"WARNING: checkpoint: not saved: {reason}; {room}; {_clean_up(save)}")

    def _tracker_failed(self, error: OSError) -> None:
        """On rank 0, after an asynchronous save: the checkpoint is whole, and the tracker names the one before."""
        text = f"the tracker still names the checkpoint before this one: {_reason(error)}"
        print(f" smartmoe: WARNING: checkpoint: {text}", flush=True)

    def _say(self, iteration: int, text: str) -> None:
        if dist.get_rank() == 0:
            print(f" smartmoe: iteration {iteration:8d} | {text} |", flush=True)


class SavedDigests(Callback):
    """Has `saves` compute the digests of a checkpoint as the innermost part of a save."""

    order: ClassVar[Order] = Order.DIGESTS

    def __init__(self, saves: CheckpointSaves) -> None:
        self._saves = saves

    def around_save(self, iteration: int) -> AbstractContextManager[None]:
        """While Megatron writes."""
        return self._saves.digesting()


def _lacking(save: _Save) -> str:
    """What keeps this rank from adding to the digests, or nothing; waits until its part of them is computed."""
    if save.digests is None:
        return "this rank has no digests"
    try:
        save.digests.sums()
    except Exception as error:  # the manifest is written without digests then
        return _reason(error)
    return ""


def _own_entries(save: _Save) -> list[FileEntry]:
    """Size and checksum of the files that this rank is responsible for: in torch_dist its own, else an equal part.

    Raises:
        OSError: one cannot be read.
    """
    if save.arguments.ckpt_format not in FORMATS:
        return []
    rank, world = dist.get_rank(), dist.get_world_size()
    part = save.folder / PART.format(rank=rank)
    if part.is_file():
        found = json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
        return [FileEntry(name=name, size_bytes=size, checksum=checksum) for name, size, checksum in found]
    if save.arguments.ckpt_format == "torch_dist":
        paths = sorted(save.folder.glob(SHARDS.format(rank=rank)))
    else:
        paths = _files(save.folder)[rank::world]
    return [_entry(save.folder, path) for path in paths]


def _files(folder: Path) -> list[Path]:
    """Every file of an iteration but the manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and MANIFEST_FILE not in path.name)


def _entry(folder: Path, path: Path) -> FileEntry:
    size_bytes, checksum = checksum_of_written(path)
    return FileEntry(name=path.relative_to(folder).as_posix(), size_bytes=size_bytes, checksum=checksum)


def _manifest(save: _Save, entries: list[FileEntry], digests: tuple[Any, ...]) -> Manifest:
    """The manifest of a save, with the checksums of the files that no rank has listed.

    Raises:
        OSError: a file cannot be read.
    """
    args = save.arguments
    listed = {entry.name for entry in entries}
    names = {path.relative_to(save.folder).as_posix(): path for path in _files(save.folder)}
    others = [_entry(save.folder, path) for name, path in names.items() if name not in listed]
    return Manifest(
        iteration=save.iteration,
        format=args.ckpt_format,
        files=tuple(sorted([*entries, *others], key=lambda entry: entry.name)),
        digests=digests,
        consumed_samples=int(args.consumed_train_samples),
        arguments={name: _masked(name, value) for name, value in sorted(vars(args).items()) if _is_plain(value)},
        placement=getattr(args, "smartmoe_placement", None),
        software={"megatron_smartmoe": __version__} | {name: metadata.version(name) for name in _SOFTWARE},
    )


def _masked(name: str, value: object) -> object:
    """A value as the manifest has it: as it is, unless it is a secret."""
    is_secret = isinstance(value, str) and secrets_among((f"--{name.replace('_', '-')}", value))
    return MASK if is_secret else value


def _is_plain(value: object) -> bool:
    """Whether a value of an argument can be written as JSON."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _prepare(save: _Save) -> str:
    """On rank 0: make room for a save; what is wrong, or nothing.

    A folder that is there already is what an interrupted save, or a run that was resumed from an earlier iteration, has
    left. It is removed, so that none of its files is taken for one of the new checkpoint. If it is in force, the newest
    other checkpoint is put in force first.
    """
    try:
        save.directory.mkdir(parents=True, exist_ok=True)
        probe = save.directory / f".smartmoe_probe.{os.getpid()}"
        with probe.open("wb") as file:
            file.write(b"probe")
        probe.unlink()
        if save.folder.is_dir() and not save.folder.is_symlink() and any(save.folder.iterdir()):
            _remove_old(save)
    except OSError as error:
        return _reason(error)
    return ""


def _remove_old(save: _Save) -> None:
    what = "an earlier save of this iteration" if (save.folder / MANIFEST_FILE).is_file() else "a half-written save"
    if _tracked(save.directory) == save.iteration:
        before, _ = newest_whole(save.directory, without=(save.iteration,))
        iteration = None if before is None else iteration_of(before.folder)
        if iteration is None:
            return  # there is nothing to go back to: Megatron writes over it, file by file
        write_tracker(save.directory, iteration)
    shutil.rmtree(save.folder)
    print(f" smartmoe: iteration {save.iteration:8d} | checkpoint: {what} is replaced: {save.folder} |", flush=True)


def _tracked(directory: Path) -> int | None:
    """The iteration that is in force."""
    try:
        named = read_tracker(directory)
    except CheckpointError:
        return None
    return named if isinstance(named, int) else None


def _clean_up(save: _Save) -> str:
    """On rank 0, after a failed save: remove what it has written; says so, and what is in force."""
    in_force = _tracked(save.directory)
    said = "there is no earlier checkpoint" if in_force is None else f"iteration {in_force} stays the newest checkpoint"
    if in_force != save.iteration and not save.folder.is_symlink():
        shutil.rmtree(save.folder, ignore_errors=True)
        said = f"its files are removed, {said}"
    return f"{said}, and training continues"


def _reason(error: BaseException) -> str:
    """What went wrong in a few words: the system's own, if an error of the system is behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            where = f": {cause.filename}" if cause.filename else ""
            return f"{cause.strerror}{where}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            return _reason(failure)
        return "another rank could not write its files"
    if any(name in str(error) for name in _TORCH_WRITER):
        return "torch could not write a file"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
