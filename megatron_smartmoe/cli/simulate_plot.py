"""The simulator's plot: the distribution of imbalance of each policy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a login node
import matplotlib.pyplot as plt
import numpy as np

from megatron_smartmoe.cli.simulate_table import Simulated

# Okabe and Ito (2008): a palette for colour-blind readers too.
_COLOURS = (
    "#D55E00",
    "#000000",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
    "#999999",
    "#882255",
)


def draw(simulated: Simulated, path: Path) -> None:
    """One line per policy: share of (record, layer, group, micro-batch) at or below an imbalance."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for at, result in enumerate(simulated.results):
        ordered = np.sort(result.imbalance)
        share = np.arange(1, len(ordered) + 1) / len(ordered) * 100
        axes.step(ordered, share, where="post", label=result.name, color=_COLOURS[at % len(_COLOURS)])
    axes.axvline(float(simulated.bounds.mean()), color="#777777", linestyle=":", label="lower bound, mean")
    axes.set_xscale("log")
    axes.set_xlabel("max / mean tokens per rank (1 is perfect)")
    axes.set_ylabel("layers and micro-batches at or below, %")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    plt.close(figure)
