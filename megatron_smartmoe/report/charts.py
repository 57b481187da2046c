"""Charts of the report: SVG and PNG inside of the page, in its colours, light or dark.

Matplotlib draws them; what it draws in `_INK` and `_FAINT` takes the page's own colours through CSS, so that a chart is
readable on a light and on a dark background, and on paper. Texts stay texts, for search and screen readers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from megatron_smartmoe.report.plot_style import BLUE, GREEN, ORANGE, OURS, PINK, SKY, styled
from megatron_smartmoe.spec.arrays import FloatArray

COLOURS = (OURS, BLUE, GREEN, ORANGE, PINK, SKY)
_INK, _FAINT = "#010203", "#dcdcdd"  # stand for the page's colours of text and of lines
_THEME: Any = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "savefig.transparent": True,
}
_LEVELS = 48
_NUMBERS = count()


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A curve: its name, and values by iteration; dashed for what is compared with."""

    name: str
    iteration: FloatArray
    value: FloatArray
    colour: str = OURS
    dashed: bool = False


def lines(
    curves: Sequence[Line], *, y_label: str, title: str, marks: Sequence[float] = (), at_least: float = 0.0
) -> str:
    """Curves over iterations as SVG.

    Args:
        curves: with at least one value each.
        y_label: with its unit.
        title: what a screen reader says.
        marks: iterations to mark with a thin line, such as moves.
        at_least: where the vertical axis begins, if the values allow it; NaN for where they begin.
    """

    def draw(axes: Axes, *, narrow: bool) -> None:
        for curve in curves:
            style = "--" if curve.dashed else "-"
            marker = "o" if len(curve.value) == 1 else None
            axes.plot(curve.iteration, curve.value, style, color=curve.colour, label=curve.name, marker=marker)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.7, linestyle=":")
        if np.isfinite(at_least):
            axes.set_ylim(bottom=at_least)
        axes.set_xlabel("iteration")
        axes.set_ylabel(y_label)
        if len(curves) > 1:
            _add_legend(axes, narrow=narrow, beside={"loc": "best"})

    return _both_widths(draw, 2.4, title)


def stacked(
    iteration: FloatArray, parts: Mapping[str, FloatArray], *, y_label: str, title: str, line: float | None = None
) -> str:
    """Parts that add up, over iterations, as SVG.

    Args:
        iteration: `[N]`.
        parts: values of each, from the bottom upwards.
        y_label: with its unit.
        title: what a screen reader says.
        line: a value to draw a dashed line at; None for none.
    """

    def draw(axes: Axes, *, narrow: bool) -> None:
        if len(iteration) == 1:
            bottom = 0.0
            for (name, values), colour in zip(parts.items(), COLOURS, strict=False):
                axes.bar([f"iteration {iteration[0]:g}"], values, bottom=bottom, label=name, color=colour, width=0.4)
                bottom += float(values[0])
        else:
            axes.stackplot(iteration, list(parts.values()), labels=list(parts), colors=COLOURS, linewidth=0)
            axes.set_xlabel("iteration")
        if line is not None:
            axes.axhline(line, color=_INK, linewidth=1.0, linestyle="--")
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel(y_label)
        _add_legend(axes, narrow=narrow, beside={"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}, reverse=True)

    return _both_widths(draw, 2.8, title)


def heat_map(values_XY: FloatArray, most: float) -> str:
    """A picture with a pixel per value, x to the right and y downwards, as a data URI; 0 is dark and `most` bright.

    In `_LEVELS` steps with a palette, which is a tenth of the bytes of full colours.
    """
    level_YX = np.rint(np.clip(values_XY.T / most, 0.0, 1.0) * (_LEVELS - 1)).astype(np.uint8)
    picture = Image.frombytes("P", level_YX.shape[::-1], level_YX.tobytes())
    palette = colormaps["cividis"](np.linspace(0.0, 1.0, _LEVELS))[:, :3]
    picture.putpalette((palette * 255).astype(np.uint8).tobytes())
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _both_widths(draw: Callable[..., None], height: float, title: str) -> str:
    """A chart for a screen or paper, and one for a phone, on which the first one's text would be too small to read.

    Args:
        draw: draws on axes; `narrow` says for which of the two.
        height: of the broad one, in inches.
        title: what a screen reader says.
    """
    found = []
    for kind, width, tall in (("broad", 7.2, height), ("narrow", 3.9, 3.0)):
        with _drawing(width, tall) as (axes, out):
            draw(axes, narrow=kind == "narrow")
        found.append(_inline(out[0], title, kind))
    return "".join(found)


def _add_legend(axes: Axes, *, narrow: bool, beside: Mapping[str, Any], **options: Any) -> None:
    """A legend as `beside` places it, or above a narrow chart."""
    longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
    above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 1 if longest > 18 else 2, "borderaxespad": 0.2}
    axes.legend(**(above if narrow else beside), **options)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and where the SVG is put afterwards."""
    out: list[str] = []
    with styled(), plt.rc_context({**_THEME, "svg.hashsalt": f"report {next(_NUMBERS)}"}):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield axes, out
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            out.append(text.getvalue())
        finally:
            plt.close(figure)


def _inline(svg: str, title: str, kind: str) -> str:
    """An SVG document as an element of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    referred = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", body)
    body = re.sub(r' (?:width|height)="[\d.]+pt"', "", body, count=2)
    body = body.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    return body.replace("<svg", f'<svg role="img" aria-label="{title}" class="chart {kind}"', 1)
