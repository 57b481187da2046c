"""The plot of step time over iterations: the paper's rule beside ours, a line for each interval."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron_smartmoe.report import plot_style
from megatron_smartmoe.spec.arrays import FloatArray
from scripts.paper.online import EVEN, INTERVALS, OURS, PAPER, STATIC, Online

_COLOURS = dict(zip(INTERVALS, (plot_style.BLUE, plot_style.SKY, plot_style.GREEN, plot_style.PINK), strict=True))
_RECORDS = 5  # of the moving mean: single records are noisy, and a move's cost is spread over the steps that it serves


def draw(found: Online, path: Path) -> None:
    """Two panels with one axis of milliseconds, in the format that the file's name ends with."""
    with plot_style.styled():
        figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9, 3.6), layout="constrained")
        for axes, policy, title in zip(panels, (PAPER, OURS), ("SmartMoE's rule", "ours: homes that pay"), strict=True):
            _line(axes, found, (STATIC, 0), "static", plot_style.BLACK)
            for interval in INTERVALS:
                _line(axes, found, (policy, interval), f"every {interval}", _COLOURS[interval])
            _line(axes, found, (EVEN, 0), "even load", plot_style.GREY)
            axes.set(title=title, xlabel="training iteration", ylim=(0, None))
            axes.legend(ncols=2)
        panels[0].set_ylabel(f"predicted time of {len(found.layer)} MoE layers, ms per step")
        plot_style.save(figure, path)


def _line(axes: Axes, found: Online, key: tuple[str, int], label: str, colour: str) -> None:
    style = "--" if key[0] in (STATIC, EVEN) else "-"
    axes.plot(found.iteration, _smooth(found.seconds[key].sum(axis=1) * 1e3), style, label=label, color=colour)


def _smooth(values: FloatArray) -> FloatArray:
    """Moving mean over `_RECORDS`, of fewer at the ends."""
    weights = np.ones(_RECORDS)
    return np.asarray(np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same"))
