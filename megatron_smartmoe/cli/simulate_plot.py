"""The simulator's plot: how balanced each policy is and how long a layer takes, a row per policy, the fastest first."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron_smartmoe.cli.simulate_table import Simulated
from megatron_smartmoe.report import plot_style
from megatron_smartmoe.simulate.run import PolicyResult

_OURS = "smartmoe"


def draw(simulated: Simulated, path: Path) -> None:
    """Two panels with the same rows: max / mean tokens per rank, and predicted milliseconds beside the even load's."""
    ranked = simulated.by_time
    with plot_style.styled():
        figure, (balance, time) = plt.subplots(
            1, 2, sharey=True, figsize=(9, 1.3 + 0.3 * len(ranked)), layout=plot_style.columns()
        )
        for row, result in enumerate(ranked):
            colour = plot_style.OURS if result.name == _OURS else plot_style.BLUE
            _draw_balance(balance, row, result, colour)
            _draw_time(time, row, result, colour, float(simulated.even_s.mean()))
        _finish_balance(balance, simulated)
        _finish_time(time, simulated)
        balance.set_yticks(range(len(ranked)), [result.name for result in ranked])
        for label in balance.get_yticklabels():
            if label.get_text() == _OURS:
                label.set(color=plot_style.OURS, fontweight="bold")
        balance.set_ylim(len(ranked) - 0.4, -0.6)
        plot_style.save(figure, path)


def _draw_balance(axes: Axes, row: int, result: PolicyResult, colour: str) -> None:
    """From the median to the 99th percentile a bar, to the worst a thin line, the mean a dot with its value."""
    middle, p99 = np.quantile(result.imbalance, [0.5, 0.99])
    mean, worst = float(result.imbalance.mean()), float(result.imbalance.max())
    axes.plot([middle, worst], [row, row], color=colour, linewidth=1, solid_capstyle="butt")
    axes.plot([middle, p99], [row, row], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
    axes.plot([mean], [row], "o", color=colour, markersize=5)
    axes.annotate(
        f"{mean:.3f}",
        (worst, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=colour,
        annotation_clip=False,
    )


def _draw_time(axes: Axes, row: int, result: PolicyResult, colour: str, even_s: float) -> None:
    """A bar for the layer, a lighter one behind it for moves of homes, and the share of an even load's speed."""
    layer_ms, moving_ms = float(result.layer_s.mean()) * 1e3, float(result.moving_s.mean()) * 1e3
    axes.barh(row, layer_ms, height=0.62, color=colour)
    axes.barh(row, moving_ms, left=layer_ms, height=0.62, color=colour, alpha=0.35)
    axes.annotate(
        f"{layer_ms + moving_ms:.2f} ms, {even_s / result.total_s:.1%}",
        (layer_ms + moving_ms, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=colour,
    )


def _finish_balance(axes: Axes, simulated: Simulated) -> None:
    setup = simulated.setup
    plot_style.ratio_axis(axes, max(float(result.imbalance.max()) for result in simulated.results) * 1.35)
    axes.axvline(float(simulated.bounds.mean()), color=plot_style.BLACK, linestyle=":", linewidth=1)
    axes.grid(visible=False, axis="y")
    slots = f"{setup.spare_slots} spare slot{'' if setup.spare_slots == 1 else 's'}"
    axes.set_title(f"Balance: {setup.num_ranks} ranks, {slots} each")
    axes.set_xlabel("max / mean tokens per rank\n(dot: mean; bar: p50 to p99; line: worst; dotted: bound)")


def _finish_time(axes: Axes, simulated: Simulated) -> None:
    even_ms, slowest_s = float(simulated.even_s.mean()) * 1e3, max(result.total_s for result in simulated.results)
    axes.axvline(even_ms, color=plot_style.BLACK, linestyle=":", linewidth=1)
    axes.set_xlim(0, slowest_s * 1e3 * 1.3)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"Predicted time: {simulated.prices.cluster.name[:30]}")
    axes.set_xlabel(
        f"ms a layer and micro-batch; % of even-load speed\n(paler: homes move; dotted: even load, {even_ms:.3g} ms)"
    )
