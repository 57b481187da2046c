"""How a run ended, for the last line that a person sees: which rank died by what, what is saved, how to continue.

The launchers of several nodes tell each other through the shared run directory: each writes the deaths on its node
(`failed-node1.json`) and looks for the others' once a second, so that all end within seconds and all print the same
first cause. A file of an earlier start of the run has another `attempt` and is not read.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter.launch.deaths import Death, first_cause
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.checkpoint.directory import read_tracker
from megatron_smartmoe.errors import CheckpointError

ATTEMPT_VARIABLE = "SMARTMOE_ATTEMPT"  # of the launcher that has started this one through srun
_PREFIX = "failed-"
_BY_REQUEST = (-signal.SIGTERM, -signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class SharedDeaths:
    """The deaths of all nodes of a job, in files of the run directory.

    Attributes:
        directory: the run directory, on a file system that all nodes see.
        name: of this launcher in the job: `node1`, or `rank3` with a Slurm task per rank.
        attempt: which start of the run this is; the same on all nodes.
        since_s: files that were written before are of an earlier start, where no job number tells them apart; a time of
            the file system's clock.
    """

    directory: Path
    name: str
    attempt: str
    since_s: float = 0.0

    def from_now_on(self) -> SharedDeaths:
        """The same, without what launchers of earlier starts have left.

        Raises:
            OSError: the run directory cannot be written.
        """
        self.write([])
        return replace(self, since_s=self._path.stat().st_mtime)

    def write(self, deaths: list[Death]) -> None:
        """Publish this launcher's deaths."""
        content = {"attempt": self.attempt, "deaths": [death.to_json() for death in deaths]}
        write_text(self._path, json.dumps(content) + "\n")

    def of_others(self) -> list[Death]:
        """The deaths that other launchers of this job have published."""
        found: list[Death] = []
        for path in self.directory.glob(f"{_PREFIX}*.json"):
            if path != self._path:
                found += self._read(path)
        return found

    @property
    def _path(self) -> Path:
        return self.directory / f"{_PREFIX}{self.name}.json"

    def _read(self, path: Path) -> list[Death]:
        try:
            if path.stat().st_mtime < self.since_s:
                return []
            content = json.loads(path.read_text(encoding="utf-8"))
            return [Death.from_json(death) for death in content["deaths"]] if content["attempt"] == self.attempt else []
        except (OSError, ValueError, KeyError, TypeError):
            return []  # not a file of this program, or gone again


def attempt_of(environ: Mapping[str, str] = os.environ) -> str:
    """Which start of a run this is, the same on all nodes of a Slurm step; a job that is queued again has another."""
    if ATTEMPT_VARIABLE in environ:
        return environ[ATTEMPT_VARIABLE]
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(environ.get(name, "0") for name in names)


def forget(directory: Path) -> None:
    """Remove what launchers of earlier starts wrote."""
    for path in directory.glob(f"{_PREFIX}*.json"):
        path.unlink(missing_ok=True)


@dataclass(kw_only=True)
class Ending:
    """Collects what the last line needs. One per launcher.

    Attributes:
        save: where checkpoints go; None for nowhere.
        resume: the command that continues the run; None where there is nothing to continue.
        shared: the deaths of other nodes; None for a job of one launcher.
        deaths: ranks of this launcher that died.
        error: why torchrun could not start the ranks.
        place_of: where a rank of this launcher was last, see `RankProgress.place`.
    """

    save: Path | None = None
    resume: str | None = None
    shared: SharedDeaths | None = None
    deaths: list[Death] = field(default_factory=list)
    error: str | None = None
    place_of: Callable[[int], str | None] = lambda rank: None
    _others: list[Death] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, death: Death) -> None:
        """One rank of this launcher died."""
        with self._lock:
            self.deaths.append(replace(death, place=self.place_of(death.rank)))
            if self.shared is not None:
                self._publish()

    def _publish(self) -> None:
        assert self.shared is not None
        try:
            self.shared.write(self.deaths)
        except OSError:  # a full disk: the other nodes notice when their connections break
            return

    def others_died(self) -> bool:
        """Whether a rank of another launcher died. Looks into the shared directory."""
        if self.shared is not None and not self._others:
            self._others = self.shared.of_others()
        return bool(self._others)

    @property
    def cause(self) -> Death | None:
        """The first cause, as far as it is known to this launcher."""
        return first_cause([*self.deaths, *self._others])

    def line(self, status: int, signals: list[int], log: Path | None) -> str | None:
        """The last line; None for a run that ended as it should.

        Args:
            status: exit status of the ranks' parent, -N for signal N.
            signals: that asked this launcher for the end, in order.
            log: where torchrun's own output is.
        """
        if self.shared is not None:
            self._others = self.shared.of_others()
        cause = self.cause
        if signals and (cause is None or cause.status in _BY_REQUEST):
            return None if status == 0 else self._with_way_on(f"ended by {signal.Signals(signals[0]).name}")
        if signals and cause in self.deaths:  # after a death on another node Slurm ends this one by SIGTERM
            return self._with_way_on(f"ended by {signal.Signals(signals[0]).name}, and {cause}")
        if cause is not None:
            return str(cause) if cause.is_refusal else self._with_way_on(str(cause))
        if status == 0:
            return None
        where = "" if log is None else f" (more in {log})"
        if self.error is not None:
            return self._with_way_on(f"torchrun on {platform.node()} failed: {self.error}{where}")
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        return self._with_way_on(f"the parent of the ranks on {platform.node()} {how}")

    def _with_way_on(self, what: str) -> str:
        if self.resume is None:
            return what
        iteration = newest_iteration(self.save)
        if iteration is None:
            saved = "no folder of checkpoints (--save)" if self.save is None else f"nothing is saved yet in {self.save}"
            return f"{what} | {saved} | to start again: {self.resume}"
        return f"{what} | saved: iteration {iteration} in {self.save} | to continue: {self.resume}"


def newest_iteration(save: Path | None) -> int | None:
    """The iteration of the newest checkpoint, as Megatron's tracker has it."""
    try:
        found = None if save is None else read_tracker(save)
    except CheckpointError:
        return None
    return found if isinstance(found, int) else None


def as_message(line: bytes) -> dict[str, Any]:
    """One line of the pipe between torchrun's process and the launcher."""
    content = json.loads(line)
    assert isinstance(content, dict)
    return content
