"""What the launchers of a batch job tell its script (scripts/pretrain_gpt_moe.slurm), in files that the script names.

The script outlives the ranks and decides whether Slurm queues the job again. It has to know what only the launchers do:
that Slurm has preempted the job, and which node lost a rank after how much work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.adapter.launch.deaths import Death

VARIABLE = "SMARTMOE_TO_BE_CONTINUED"  # the path of the file that rank 0 creates with the first checkpoint
_PROGRESS = "metrics.jsonl"  # of the run directory: a line for every iteration that is logged


def saves_on_sigterm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SIGTERM asks the ranks to save and end: Slurm sends it to all processes of a job that it preempts."""
    return bool(environ.get(VARIABLE)) and "SLURMD_NODENAME" in environ


def save_on_sigterm(exit_signal: signal.Signals) -> None:
    """In a rank: have SIGTERM do what the signal of --exit-signal-handler does, where Slurm may send it."""
    if saves_on_sigterm() and exit_signal != signal.SIGTERM:  # Megatron itself handles that one
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(exit_signal))


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """The batch job that this launcher belongs to.

    Attributes:
        marker: the path that the script has named.
        directory: the run directory.
        node: Slurm's name of this node.
        began_s: when this launcher began, seconds since the epoch.
    """

    marker: Path
    directory: Path
    node: str
    began_s: float

    @classmethod
    def of_environment(cls, directory: Path, environ: Mapping[str, str] = os.environ) -> BatchJob | None:
        """The job, where this project's script has started it; else None."""
        if not saves_on_sigterm(environ):
            return None
        return cls(
            marker=Path(environ[VARIABLE]),
            directory=directory,
            node=environ["SLURMD_NODENAME"],
            began_s=time.time(),
        )

    @property
    def stop_note(self) -> Path:
        """Exists when Slurm has asked a launcher for the end."""
        return self.marker.with_name(f"{self.marker.name}.stopped")

    def note_crash(self, cause: Death) -> None:
        """Write which node lost the rank whose death was the first, unless the user's flags were refused.

        The file holds the node's name and whether an iteration was logged since this launcher began.
        """
        if cause.is_refusal:
            return
        try:
            has_progressed = (self.directory / _PROGRESS).stat().st_mtime >= self.began_s
        except OSError:
            has_progressed = False
        path = self.marker.with_name(f"{self.marker.name}.crashed")
        with contextlib.suppress(OSError):  # then the job is not queued again
            path.write_text(f"{self.node} {'progressed' if has_progressed else 'stuck'}\n", encoding="utf-8")
