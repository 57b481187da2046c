"""Writes launch.json when a run starts: what `auto` chose, which no argument says."""

from __future__ import annotations

import functools

from megatron_smartmoe.adapter.cost_inputs import dispatcher_of, ranks_per_node
from megatron_smartmoe.adapter.hooks import Callback
from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.report.chosen import FILE, Chosen
from megatron_smartmoe.spec.parallel import FLAT, HIERARCHICAL


class ChosenRecorder(Callback):
    """See the module.

    Args:
        overlap_degree: of the run.
    """

    def __init__(self, overlap_degree: OverlapDegree) -> None:
        self._overlap_degree = overlap_degree

    def on_start(self, run: Run) -> None:
        """Write the file. The layers have been built, so everything is chosen."""
        chosen = Chosen(
            dispatch=HIERARCHICAL if dispatcher_of(run.args).name == HIERARCHICAL else FLAT,
            overlap_degree=self._overlap_degree(),
            ranks_per_node=ranks_per_node(),
        )
        if run.is_reporter and run.directory is not None:
            path = run.directory / FILE
            run.attempt(path, functools.partial(write_text, path, chosen.to_text()))
