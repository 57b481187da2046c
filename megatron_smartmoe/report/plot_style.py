"""One style for all plots: colours that colour-blind readers can tell apart, light grids, readable ticks.

Matplotlib is slow to import and not needed otherwise: import this module where something is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a login node
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

# Okabe and Ito (2008).
OURS, BLACK, BLUE, SKY, GREEN, ORANGE, PINK = (
    "#D55E00",
    "#000000",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#CC79A7",
)
GREY, FAINT = "#777777", "#DDDDDD"

_STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "smartmoe",  # the same figures give the same file
}
_RATIO_TICKS = (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style inside of this, and leave matplotlib's settings as they were."""
    with plt.rc_context(_STYLE):
        yield


def columns() -> ConstrainedLayoutEngine:
    """A layout for axes side by side, whose last and first tick labels stay apart."""
    return ConstrainedLayoutEngine(wspace=0.06)


def save(figure: Figure, path: Path) -> None:
    """Write the picture in the format that the name ends with, without a date, and let go of its memory."""
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, metadata=dated.get(path.suffix))
    plt.close(figure)


def ratio_axis(axes: Axes, most: float) -> None:
    """A logarithmic x axis of ratios from 1 to `most`, with as many labels as do not touch."""
    axes.set_xscale("log")
    axes.set_xlim(0.98, most * 1.06)
    wide = [tick for tick in _RATIO_TICKS if tick <= most * 1.06]
    every = most ** (1 / 7)  # of the axis, between two labels
    shown = [1.0]
    for tick in wide:
        if tick >= shown[-1] * max(every, 1.001):
            shown.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
