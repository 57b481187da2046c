"""The soak's picture: losses, how far the runs are apart, memory, and CPU time per step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from megatron_smartmoe.report import plot_style

if TYPE_CHECKING:
    from scripts.reliability.soak_judge import SoakRun

COLOURS = {
    "off": plot_style.BLACK,
    "rounded-1": plot_style.BLUE,
    "rounded-2": plot_style.SKY,
    "all": plot_style.OURS,
    "homes": plot_style.GREEN,
}
LABELS = {
    "off": "off",
    "rounded-1": "off, gradients rounded (1)",
    "rounded-2": "off, gradients rounded (2)",
    "homes": "homes",
    "all": "homes, replicas and pool",
}
MEAN_STEPS = 200  # of the losses' moving mean
EVERY = 10  # steps between two points of it
SAMPLES = 10  # of which the step time is the median
MIB = 2**20


def draw(runs: Mapping[str, SoakRun], path: Path) -> None:
    """Write the picture, in the format that the file's name ends with."""
    with plot_style.styled():
        _draw(runs, path)


def _draw(runs: Mapping[str, SoakRun], path: Path) -> None:
    figure, ((loss, apart), (memory, cpu)) = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for name, run in runs.items():
        style: dict[str, Any] = {"color": COLOURS[name], "label": LABELS[name], "linewidth": 1.1}
        style["zorder"] = 3 if name == "all" else 2  # never under another curve
        at, mean = _moving_mean(run)
        loss.plot(at, mean, **style)
        if name != "off":
            apart.plot(at, mean - _moving_mean(runs["off"])[1], **style)
        first = run.samples[0]
        at = np.array([sample["iteration"] for sample in first])
        memory.plot(at, [max(_rss(samples, row) for samples in run.samples) for row in range(len(first))], **style)
        cpu.plot(*_cpu(first), **style)
    loss.set(ylabel=f"loss, nats per token, mean of {MEAN_STEPS} steps")
    apart.set(ylabel=f"loss minus that of off, mean of {MEAN_STEPS} steps")
    memory.set(ylabel="memory of the largest rank, MiB (RSS)")
    cpu.set(ylabel="CPU time of rank 0 per step, ms")
    for axes in (memory, cpu):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    for axes in (loss, apart, memory, cpu):
        axes.set_xlabel("training step")
    loss.legend()
    plot_style.save(figure, path)


def _moving_mean(run: SoakRun) -> tuple[np.ndarray, np.ndarray]:
    losses = np.array([run.losses[iteration] for iteration in sorted(run.losses)])
    width = min(MEAN_STEPS, len(losses))
    mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(width, len(losses) + 1)[::EVERY], mean[::EVERY]


def _rss(samples: Any, row: int) -> float:
    return float(samples[min(row, len(samples) - 1)]["rss_bytes"]) / MIB


def _cpu(samples: Any) -> tuple[list[int], list[float]]:
    at, found = [], []
    for begin in range(0, len(samples) - SAMPLES, SAMPLES):
        part = samples[begin : begin + SAMPLES + 1]
        times = [
            1e3 * (after["cpu_s"] - before["cpu_s"]) / (after["iteration"] - before["iteration"])
            for before, after in pairwise(part)
            if after["pid"] == before["pid"]
        ]
        if times:
            at.append(part[-1]["iteration"])
            found.append(statistics.median(times))
    return at, found
