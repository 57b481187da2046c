"""Which checkpoint to resume from: the one in force, or the newest whole one if that is damaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.checkpoint.directory import (
    RELEASE,
    TRACKER,
    TrackerError,
    folder_of,
    iteration_of,
    iterations,
    read_tracker,
)
from megatron_smartmoe.checkpoint.inspection import Inspection, inspect
from megatron_smartmoe.checkpoint.manifest import Level
from megatron_smartmoe.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Which checkpoint to resume from when the one in force may be damaged.

    Attributes:
        found: the checkpoint; None if there is no whole one.
        named: the iteration that the tracker or the user named, or what else the tracker holds; None without one.
        problem: what is wrong with that one, as the end of a sentence about it; None if it is whole and chosen.
        skipped: further checkpoints that are newer than the chosen one and damaged.
    """

    found: Inspection | None
    named: int | str | None
    problem: str | None
    skipped: tuple[Inspection, ...]

    @property
    def iteration(self) -> int | None:
        """The iteration of the chosen checkpoint; None for none and for a release."""
        return None if self.found is None else iteration_of(self.found.folder)

    @property
    def lost_iterations(self) -> int | None:
        """Iterations of training that are repeated because of the damage; None where it is not known."""
        if self.problem is None:
            return 0
        if not isinstance(self.named, int) or self.iteration is None:
            return None
        return max(self.named - self.iteration, 0)

    def line(self) -> str | None:
        """What is done instead of what the tracker says, for a log; None if it is what the tracker says."""
        if self.problem is None:
            return None
        damaged = "".join(f", {inspection.folder.name}: {inspection.problem}" for inspection in self.skipped)
        chosen = "there is no whole checkpoint: training starts from iteration 0"
        if self.found is not None:
            lost = self.lost_iterations
            cost = "" if lost is None else f"; {lost} iteration{'s' * (lost != 1)} of training are lost"
            chosen = f"resuming from iteration {self.iteration}, the newest whole checkpoint{cost}"
        return f"{self.problem}{damaged}; {chosen}"


def choose_resume(
    directory: Path, asked: int | None = None, level: Level = "sizes", damaged: Mapping[int, str] | None = None
) -> Resume:
    """The checkpoint in force if it is whole, else the newest whole one.

    Every rank that sees the same files chooses the same; to be sure, let one choose and send the iteration.

    Args:
        directory: of the checkpoints.
        asked: the iteration that the user names (--ckpt-step) instead of the tracker.
        level: how closely to look.
        damaged: what was already found to be wrong with iterations, such as by the ranks that read them.
    """
    damaged = dict(damaged or {})
    named: int | str | None = asked
    if asked is None:
        try:
            named = read_tracker(directory)
        except CheckpointError as error:
            found, skipped = newest_whole(directory, level, damaged)
            held = error.content if isinstance(error, TrackerError) else None
            return Resume(found=found, named=held, problem=str(error), skipped=skipped)
    if named is None and not iterations(directory):
        return Resume(found=None, named=None, problem=None, skipped=())
    if named is None:
        found, skipped = newest_whole(directory, level, damaged, newest=-1)
        problem = f"{directory} has no tracker ({TRACKER}), so no save in it was finished"
        return Resume(found=found, named=None, problem=problem, skipped=skipped)
    folder = directory / RELEASE if isinstance(named, str) else folder_of(directory, named)
    number = named if isinstance(named, int) else None
    if number is not None and number in damaged:
        problem = damaged[number]
    else:
        inspection = inspect(folder, level)
        if inspection.is_whole:
            return Resume(found=inspection, named=named, problem=None, skipped=())
        problem = inspection.problem
    known = {*damaged, *([number] if number is not None else [])}
    found, skipped = newest_whole(directory, level, known, newest=number)
    return Resume(found=found, named=named, problem=f"{folder.name}: {problem}", skipped=skipped)


def newest_whole(
    directory: Path, level: Level = "sizes", without: Collection[int] = (), newest: int | None = None
) -> tuple[Inspection | None, tuple[Inspection, ...]]:
    """The newest whole checkpoint of a directory, and the damaged ones that are newer.

    A folder that is newer than what the tracker names may be half written: it needs a manifest, which is written last.

    Args:
        directory: of the checkpoints.
        level: how closely to look.
        without: iterations to leave out, known to be damaged.
        newest: the iteration that the tracker names, if it names one.
    """
    damaged: list[Inspection] = []
    for iteration in iterations(directory):
        if iteration in without:
            continue
        found = inspect(folder_of(directory, iteration), level)
        may_be_half = found.manifest is None and newest is not None and iteration > newest
        if found.is_whole and not may_be_half:
            return found, tuple(damaged)
        if not may_be_half:
            damaged.append(found)
    return None, tuple(damaged)
