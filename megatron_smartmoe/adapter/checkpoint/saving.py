"""Saves that lose nothing: a manifest for every checkpoint, and no failed save that ends training.

A checkpoint is in force when the tracker names it. Around Megatron's own save:

1. What has been saved already is not saved again; an interrupted save's folder is removed before it is written anew.
2. Megatron writes the files. Training waits for that, or not (`--async-save`).
3. A thread does the rest beside the training (`finishing`): digests of what each rank holds, checksums of the files,
   the manifest, and only then the tracker.
4. The next save, an evaluation and the end of the training wait for that thread.

A save that fails (a full disk, a folder that cannot be written) is abandoned on all ranks alike: its folder is removed,
the checkpoint before it stays in force, one line says so, and training continues.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_smartmoe.adapter import hooks
from megatron_smartmoe.adapter.checkpoint import tracker
from megatron_smartmoe.adapter.checkpoint.digests import LocalDigests
from megatron_smartmoe.adapter.checkpoint.finishing import Finishing, Save
from megatron_smartmoe.adapter.checkpoint.folders import save_directory
from megatron_smartmoe.adapter.checkpoint.held import held_tensors
from megatron_smartmoe.adapter.checkpoint.problems import reason
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.loops.homes import saves_slots
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.checkpoint.directory import iteration_of, read_tracker, write_tracker
from megatron_smartmoe.checkpoint.inspection import readable_bytes
from megatron_smartmoe.checkpoint.manifest import FORMATS, MANIFEST_FILE
from megatron_smartmoe.checkpoint.resume import newest_whole
from megatron_smartmoe.errors import CheckpointError


class CheckpointSaves(Callback):
    """Megatron's saves, with all that this project adds to them; `hooks.attach_checkpoints` puts it around them.

    Attributes:
        failed_at: iteration of the last save if that failed; None if it succeeded.
    """

    order: ClassVar[Order] = Order.CHECKPOINT

    def __init__(self) -> None:
        self._run: Run | None = None
        self._tracker: tracker.AtomicTracker | None = None
        self._current: Finishing | None = None  # within Megatron's call
        self._latest: Finishing | None = None  # before whose end no earlier checkpoint is deleted
        self._unfinished: list[Finishing] = []  # after Megatron's call, oldest first
        self._num_saves = 0
        self._saved: tuple[Path, int] | None = None  # directory and iteration of what this run's state was saved as
        self._said = ""  # what the digests lack, as it was said last
        self.failed_at: int | None = None

    def on_start(self, run: Run) -> None:
        """Note which checkpoint the run's state was loaded from, and be told of the optimizer's steps."""
        self._run = run
        if run.loaded_folder is not None:
            self._saved = run.loaded_folder.parent.resolve(), run.args.iteration
        register_optimizer_step_pre_hook(self._before_optimizer)

    def around_evaluation(self, split: str) -> AbstractContextManager[None]:
        """An evaluation may be long: no checkpoint waits behind it."""
        self.finish_saves()
        return contextlib.nullcontext()

    def finish_saves(self) -> None:
        """Wait for the saves whose files are written. A collective call of all ranks."""
        for finishing in [one for one in self._unfinished if one.is_written]:
            self._unfinished.remove(finishing)
            save, problem = finishing.save, finishing.wait()
            if problem:
                self.failed_at = save.iteration
            else:
                self._saved, self.failed_at = (save.directory.resolve(), save.iteration), None

    def on_failure(self) -> None:
        """A save that lacks its manifest only is finished without this rank's training."""
        for finishing in self._unfinished:
            finishing.wait_alone()

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
            self.finish_saves()
            directory = save_directory(run.args, non_persistent=non_persistent_ckpt)
            if directory is None:
                began_s = time.perf_counter()
                result = call()
                hooks.saved(iteration, time.perf_counter() - began_s)
                return result
            if self._saved == (directory.resolve(), iteration):
                self._say(iteration, f"checkpoint: {directory} has this iteration already, and it is left as it is")
                return None
            return self._save(call, iteration, directory, run)

        return guarded

    def around_dist_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Around `dist_checkpointing.save`: a save in the background goes on when its files are written.

        What Megatron has yet to do then, among it the tracker, waits until the checkpoint is whole.
        """

        @functools.wraps(save)
        def followed(*args: Any, **kwargs: Any) -> Any:
            request, current = save(*args, **kwargs), self._current
            if request is None or current is None:
                return request
            self._latest = current
            self._unfinished.append(current)
            return request._replace(finalize_fns=_Finalizing([*request.finalize_fns, current.go_on], current.then))

        return followed

    def around_finalize(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        """Around the training loop's `maybe_finalize_async_save`: a failed save does not end training."""

        @functools.wraps(finalize)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    return finalize(*args, **kwargs)
                except CheckpointException as error:
                    if (being_written := self._being_written()) is None:
                        raise
                    self._abandon(being_written, being_written.save.problem or reason(error))

        return guarded

    def around_delete(self, delete: Callable[..., Any]) -> Callable[..., Any]:
        """Around the deletion of the checkpoint before (`--save-retain-interval`): not before the new one is whole."""

        @functools.wraps(delete)
        def when_whole(*args: Any, **kwargs: Any) -> Any:
            call = functools.partial(delete, *args, **kwargs)
            if self._latest is None or self._latest.save.is_async:  # then this comes after it is
                return call()
            return self._latest.then(call)

        return when_whole

    def recorded(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Around a function that one rank writes a file with, while the others wait: its failure is that of the save,
        later and on all ranks."""

        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            finishing = self._current or self._being_written()
            if finishing is None:
                return write(*args, **kwargs)
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                finishing.save.note(error)
                return None

        return attempt

    def recorded_if_legacy(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Like `recorded`, in saves of the legacy format alone: `torch.save` writes parts of others' files as well."""
        attempt = self.recorded(write)

        @functools.wraps(write)
        def choose(*args: Any, **kwargs: Any) -> Any:
            is_legacy = self._current is not None and self._current.save.arguments.ckpt_format == "torch"
            return (attempt if is_legacy else write)(*args, **kwargs)

        return choose

    def noted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Around the function that writes a shard: what went wrong, which Megatron's own report leaves out."""

        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            if self._current is not None and isinstance(result[1], Exception):
                self._current.save.note(result[1])
            return result

        return attempt

    # --- One save -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def digesting(self) -> Iterator[None]:
        """Within Megatron's save, after all that other callbacks do before it and before what they do after it: note
        what the digests are of. They are computed later, unless it would have changed by then."""
        current, run = self._current, self._run
        if current is None or run is None:
            yield
            return
        current.save.digests = self._digests(current.save, run)
        if _stays_as_it_is(run):
            yield
            return
        current.begin()
        try:
            yield
        finally:
            current.wait_for_digests()

    def _save(self, call: Callable[[], Any], iteration: int, directory: Path, run: Run) -> Any:
        """Save, or abandon the save on all ranks."""
        save = Save(
            iteration=iteration,
            directory=directory,
            arguments=run.args,
            is_async=bool(run.args.async_save),
            began_s=time.perf_counter(),
        )
        finishing = Finishing(save, self._num_saves, self._ended)
        self._num_saves += 1
        # Step 1: a folder without leftovers, on a file system that can be written.
        problem = [_prepare(save) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            return self._abandon(finishing, problem[0])
        # Step 2: Megatron's save.
        assert self._tracker is not None
        self._current, self._tracker.is_held = finishing, not save.is_async
        if not save.is_async:
            self._latest = finishing
        try:
            result = call()
        except CheckpointException as error:
            return self._abandon(finishing, save.problem or reason(error))
        finally:
            self._current, self._tracker.is_held = None, False
        # Step 3: the rest of it, beside the training, which goes on writing to its arguments.
        save.arguments = Namespace(**vars(run.args))
        if not save.is_async:
            self._unfinished.append(finishing)
            finishing.go_on()
        elif finishing in self._unfinished:
            finishing.begin()
        return result

    def _digests(self, save: Save, run: Run) -> LocalDigests | None:
        """What this rank adds to the digests."""
        if run.args.ckpt_format not in FORMATS:
            return None
        try:
            held, skipped = held_tensors(run.chunks, None if run.args.no_save_optim else run.optimizer)
            local = LocalDigests(held, run.args.num_experts or 0)
        except Exception as error:  # a model that cannot be described is saved all the same
            local, skipped = None, f"this model ({type(error).__name__}: {error})"
        if skipped and skipped != self._said:
            self._said = skipped
            self._say(save.iteration, f"checkpoint: the manifest has no digests of {skipped}")
        return local

    def _before_optimizer(self, *_: object) -> None:
        """An optimizer is about to change what digests may still be computed of."""
        for finishing in self._unfinished:
            finishing.wait_for_digests()

    def _being_written(self) -> Finishing | None:
        """The oldest save whose files are still being written in the background."""
        return next((finishing for finishing in self._unfinished if not finishing.is_written), None)

    def _ended(self, finishing: Finishing, problem: str) -> None:
        """On rank 0, in a thread: a save whose files were written is over."""
        save = finishing.save
        if problem:
            self._say_not_saved(save, problem)
            return
        if _tracked(save.directory) != save.iteration:
            return  # `_tracker_failed` has said why
        seconds = time.perf_counter() - save.began_s
        lacks = f"; its manifest has no digests ({finishing.lacks})" if finishing.lacks and save.digests else ""
        when = f"{seconds:.2f} s after the save began"
        self._say(save.iteration, f"checkpoint: complete, and the tracker names it, {when}{lacks}")
        hooks.saved(save.iteration, seconds)

    def _abandon(self, finishing: Finishing, problem: str) -> None:
        """Give a save up whose files could not be written, on all ranks."""
        save = finishing.save
        finishing.give_up()
        if finishing in self._unfinished:
            self._unfinished.remove(finishing)
        self.failed_at = save.iteration
        dist.barrier()  # no rank writes any more
        if dist.get_rank() == 0:
            self._say_not_saved(save, problem)

    def _say_not_saved(self, save: Save, problem: str) -> None:
        """On rank 0: remove what a failed save has written, and say so."""
        free = shutil.disk_usage(save.directory).free if save.directory.is_dir() else 0
        room = f"{readable_bytes(free)} are free there"
        self._say(save.iteration, f"WARNING: checkpoint: not saved: {problem}; {room}; {_clean_up(save)}")

    def _tracker_failed(self, error: OSError) -> None:
        """On rank 0, after an asynchronous save: the checkpoint is whole, and the tracker names the one before."""
        text = f"the tracker still names the checkpoint before this one: {reason(error)}"
        print(f" smartmoe: WARNING: checkpoint: {text}", flush=True)

    def _say(self, iteration: int, text: str) -> None:
        if dist.get_rank() == 0:
            print(f" smartmoe: iteration {iteration:8d} | {text} |", flush=True)


class _Finalizing(list[Callable[[], Any]]):
    """What Megatron calls when a save in the background has written its files; what it adds later waits for more."""

    def __init__(self, at_once: list[Callable[[], Any]], later: Callable[[Callable[[], Any]], None]) -> None:
        super().__init__(at_once)
        self._later = later

    def append(self, act: Callable[[], Any]) -> None:
        super().append(functools.partial(self._later, act))


class SavedDigests(Callback):
    """Has `saves` compute the digests of a checkpoint as the innermost part of a save."""

    order: ClassVar[Order] = Order.DIGESTS

    def __init__(self, saves: CheckpointSaves) -> None:
        self._saves = saves

    def around_save(self, iteration: int) -> AbstractContextManager[None]:
        """While Megatron writes."""
        return self._saves.digesting()


def _stays_as_it_is(run: Run) -> bool:
    """Whether weights and optimizer state are left alone from a save to the next step of an optimizer that says so."""
    has_homes = getattr(run.args, "smartmoe_placement", None) is not None
    moves_back = has_homes and saves_slots(run.args)
    optimizers = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    inner = [getattr(one, "optimizer", None) for one in optimizers]
    return not moves_back and all(isinstance(one, torch.optim.Optimizer) for one in inner if one is not None)


def _prepare(save: Save) -> str:
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
        return reason(error)
    return ""


def _remove_old(save: Save) -> None:
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


def _clean_up(save: Save) -> str:
    """On rank 0, after a failed save: remove what it has written; says so, and what is in force."""
    in_force = _tracked(save.directory)
    said = "there is no earlier checkpoint" if in_force is None else f"iteration {in_force} stays the newest checkpoint"
    if in_force != save.iteration and not save.folder.is_symlink():
        shutil.rmtree(save.folder, ignore_errors=True)
        said = f"its files are removed, {said}"
    return f"{said}, and training continues"
