"""Which checkpoint a run resumes from, and whether its files are whole, before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_smartmoe.adapter.flags.smartmoe_arguments import RESUME
from megatron_smartmoe.checkpoint.directory import (
    RELEASE,
    TRACKER,
    TrackerError,
    folder_of,
    iteration_of,
    iterations,
    listed,
    read_tracker,
    write_tracker,
)
from megatron_smartmoe.checkpoint.inspection import Inspection, inspect
from megatron_smartmoe.checkpoint.resume import Resume, choose_resume, newest_whole
from megatron_smartmoe.errors import CheckpointError, ConfigError


def check_files(args: argparse.Namespace) -> tuple[str, ...]:
    """Check the files of the checkpoint that will be loaded, by their sizes; returns what to print.

    Raises:
        ConfigError: one is damaged, and --smartmoe-resume does not say to take another checkpoint.
    """
    if args.load is None or args.smartmoe_checkpoint_check == "off":
        return ()
    if "://" in args.load:
        return (f"the checkpoint in {args.load} is not checked: it is in no directory of this host",)
    directory = Path(args.load)
    if args.smartmoe_resume == "newest-whole":
        choice = chosen_checkpoint(args)
        _whole_folder(args, choice)
        taken = choice.line()
        lines = () if taken is None else (taken,)
        return lines if choice.found is None else (*lines, _checked(args, choice.found))
    folder = checkpoint_to_load(args)
    if folder is None:
        return _unfinished(directory)
    found = inspect(folder)
    if not found.is_whole:
        rule = f"{folder.name} is damaged: {found.problem}"
        raise ConfigError("--load", str(directory), rule, what_is_there(directory, damaged=folder))
    return (_checked(args, found),)


def checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """The folder of the iteration that would be loaded; None if --load names no directory with a checkpoint in force.

    Raises:
        ConfigError: the tracker or --ckpt-step names no iteration, or one that is not there, or nothing whole is there.
    """
    if args.load is None or "://" in args.load:
        return None
    if args.smartmoe_resume == "newest-whole":
        return _whole_folder(args, chosen_checkpoint(args))
    directory = Path(args.load)
    tracked = _tracked(directory)
    if not args.ckpt_step:
        if tracked is None:
            return None
        folder = directory / RELEASE if isinstance(tracked, str) else folder_of(directory, tracked)
        field, value = str(directory / TRACKER), str(tracked)
    else:
        folder, field, value = folder_of(directory, args.ckpt_step), "--ckpt-step", args.ckpt_step
    if not folder.is_dir():
        raise ConfigError(field, value, f"there is no checkpoint {folder}", what_is_there(directory))
    return folder


def chosen_checkpoint(args: argparse.Namespace) -> Resume:
    """The checkpoint that --smartmoe-resume newest-whole chooses.

    It depends on the files alone, so the launcher and every rank choose the same.
    """
    return choose_resume(Path(args.load), args.ckpt_step or None)


def take_up_whole_checkpoint(
    args: argparse.Namespace, damaged: Mapping[int, str] | None = None
) -> tuple[Path | None, str | None]:
    """With --smartmoe-resume newest-whole: have Megatron load what is chosen, as --ckpt-step would. On one rank.

    Megatron reads the tracker first even then, and ends on one that is no number; such a one is written anew.

    Args:
        args: of the run; `ckpt_step` is set where the tracker names another iteration.
        damaged: what was already found to be wrong with iterations, by the ranks that have read them.

    Returns:
        The folder to load, and what is done instead of what the tracker says; None for nothing.

    Raises:
        ConfigError: nothing whole is there.
    """
    directory = Path(args.load)
    choice = choose_resume(directory, args.ckpt_step or None, damaged=damaged)
    folder = _whole_folder(args, choice)
    if folder is None or choice.iteration is None:
        return folder, choice.line()
    try:
        tracked = read_tracker(directory)
    except CheckpointError:
        tracked = None
        write_tracker(directory, choice.iteration)
    if tracked != choice.iteration:
        args.ckpt_step = choice.iteration
    return folder, choice.line()


def _whole_folder(args: argparse.Namespace, choice: Resume) -> Path | None:
    if choice.found is None and choice.named is not None:
        rule = f"{choice.problem}, and no other checkpoint in it is whole"
        way_out = "Restore the file, pass another --load, or leave it out to start from iteration 0."
        raise ConfigError("--load", args.load, rule, way_out)
    return None if choice.found is None else choice.found.folder


def _tracked(directory: Path) -> int | str | None:
    """What the tracker names.

    Raises:
        ConfigError: nothing. Megatron ends on such a tracker, also with --ckpt-step.
    """
    try:
        return read_tracker(directory)
    except TrackerError as error:
        path, whole = directory / TRACKER, newest_whole(directory)[0]
        way_out = what_is_there(directory)
        if whole is not None:
            number = iteration_of(whole.folder)
            way_out = (
                f"Write a number to it (echo {number} > {path}), or pass {RESUME} newest-whole, to resume from "
                f"iteration {number}, the newest whole checkpoint (found: {listed(iterations(directory))})."
            )
        raise ConfigError(str(path), error.content, "must be the number of an iteration", way_out) from None
    except CheckpointError as error:
        raise ConfigError("--load", str(directory), str(error), "Make the file readable.") from None


def _checked(args: argparse.Namespace, found: Inspection) -> str:
    later = args.smartmoe_checkpoint_check == "full" and found.manifest is not None
    return found.line() + ("; each rank compares the checksums of what it reads" if later else "")


def _unfinished(directory: Path) -> tuple[str, ...]:
    """Folders beside no tracker: Megatron starts from iteration 0 and writes over them."""
    left = iterations(directory)
    if not left:
        return ()
    line = f"{directory} has no tracker ({TRACKER}): the saves of {listed(left)} were not finished or the file was lost"
    return (f"{line}; training starts from iteration 0. To resume, pass {RESUME} newest-whole or --ckpt-step N",)


def what_is_there(directory: Path, damaged: Path | None = None) -> str:
    """The way out of a tracker or a checkpoint that is wrong: the newest whole checkpoint besides."""
    newest = iteration_of(damaged) if damaged is not None else None
    whole, _ = newest_whole(directory, without=() if newest is None else (newest,), newest=newest)
    others = [step for step in iterations(directory) if step != newest]
    if whole is None:
        what = f"{'no other' if damaged else 'none'}"
        if others:
            what = f"no whole one (damaged: {listed(others)})"
        return f"There is {what} in {directory}: pass another --load, or leave it out to start from iteration 0."
    number = iteration_of(whole.folder)
    assert number is not None
    lost = f"; {newest - number} iterations of training are lost" if newest is not None and newest > number else ""
    return (
        f"Pass --ckpt-step {number} to resume from the newest whole one there (found: {listed(others)}), or "
        f"{RESUME} newest-whole to do so by itself{lost}."
    )
