"""The style of plots: tick labels that do not touch, and files that depend on their figures alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from megatron_smartmoe.report import plot_style


@pytest.mark.parametrize("most", [1.0, 1.02, 1.3, 2.0, 5.0, 12.0, 64.0])
def test_labels_of_a_ratio_axis_do_not_touch(most: float) -> None:
    with plot_style.styled():
        figure, axes = plt.subplots(figsize=(4.5, 2), layout="constrained")
        plot_style.ratio_axis(axes, most)
        figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert boxes
        assert all(left.x1 + 2 < right.x0 for left, right in pairwise(boxes))
        assert axes.get_xticklabels()[0].get_text() == "1"
        plt.close(figure)


def test_a_picture_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        with plot_style.styled():
            figure, axes = plt.subplots()
            axes.plot([1, 2], [3, 4])
            plot_style.save(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "axes.grid" in plt.rcParams
    assert not plt.rcParams["axes.grid"]
