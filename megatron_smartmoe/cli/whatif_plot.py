"""The plot of `smartmoe whatif`: a bar for every setting's step, with its error bar; the run first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from megatron_smartmoe.cli.whatif_table import Basis, Prediction, in_order, label
from megatron_smartmoe.report import plot_style


def draw(predictions: Sequence[Prediction], basis: Basis, path: Path) -> None:
    """Horizontal bars, the fastest setting first below the run; the dotted line is what the run measured."""
    rows = in_order(predictions)
    with plot_style.styled():
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
        for at, one in enumerate(rows):
            _draw_row(axes, at, one, rows[0])
        axes.axvline(basis.measured_s * 1e3, color=plot_style.BLACK, linestyle=":", linewidth=1)
        several = len({one.cluster.name for one in rows}) > 1
        names = [label(one.spec) + (f", {one.cluster.name}" if several else "") for one in rows]
        axes.set_yticks(range(len(rows)), [f"the run: {names[0]}", *names[1:]])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max(one.step_s * (1 + one.bar) for one in rows) * 1.4e3)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        what = "CPU time of the busiest rank" if basis.by_rank else "wall time"
        axes.set_title(f"Predicted from {basis.run[:40]}")
        axes.set_xlabel(f"ms a step: {what}\n(line: error bar; dotted: the run, measured)")
        plot_style.save(figure, path)


def _draw_row(axes: plt.Axes, at: int, one: Prediction, run: Prediction) -> None:
    colour = plot_style.GREY if one is run else plot_style.OURS if one.step_s < run.step_s else plot_style.BLUE
    step_ms = one.step_s * 1e3
    axes.barh(at, step_ms, height=0.62, color=colour, alpha=0.75)
    axes.errorbar(step_ms, at, xerr=one.bar * step_ms, color=plot_style.BLACK, linewidth=1, capsize=2)
    axes.annotate(
        f"{step_ms:.3g} ms, {one.step_s / run.step_s - 1:+.1%}" if one is not run else f"{step_ms:.3g} ms",
        (step_ms * (1 + one.bar), at),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
    )
