"""A straight line through measured times: a fixed cost and a cost per unit, robust against points that are off.

Method. Least absolute deviations of the times' logarithms, with no negative fixed cost and a unit that costs something.
The lines that are tried are those through two of the points, and through one of them and the origin, of which a dozen
points have few: there is no step size, no threshold and no starting value, and points that lie on a line are recovered
exactly as long as most do. Logarithms, because sizes span six decades: absolute errors would leave the fixed cost to
chance, and errors relative to the measured time count a line that is far too fast (off by 100% at most) less than one
that is twice too slow. Points that make no line still get one, with a large residual.

Source: least absolute deviations (Boscovich 1757; Koenker and Bassett 1978), whose optimum passes through data points.
The alternative, least squares, follows the one point during which the machine was busy with something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.errors import PlanError

POOR_MEAN, POOR_WORST = 0.15, 0.5  # relative residuals above which a line is a poor fit: chosen, not measured


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """time of x units = fixed_s + x * unit_s.

    Attributes:
        fixed_s: seconds before the first unit.
        unit_s: seconds per unit.
        residual: mean absolute error, relative to the measured time (0.05 is 5%).
        worst: largest of them.
    """

    fixed_s: float
    unit_s: float
    residual: float
    worst: float

    @property
    def poor(self) -> bool:
        """Whether the line is a poor fit."""
        return self.residual > POOR_MEAN or self.worst > POOR_WORST

    def at(self, units: float) -> float:
        """Seconds of `units` units."""
        return self.fixed_s + units * self.unit_s


def fit_line(units: Sequence[float], time_s: Sequence[float]) -> LineFit:
    """The line with the smallest sum of absolute errors of the logarithm.

    Args:
        units: amounts: bytes or tokens.
        time_s: measured seconds, one for each entry of `units`.

    Raises:
        PlanError: fewer than two different amounts, or an amount or a time that is not positive.
    """
    x_N, time_N = np.asarray(units, dtype=np.float64), np.asarray(time_s, dtype=np.float64)
    if len(np.unique(x_N)) < 2:
        raise PlanError(f"a line needs at least two different amounts, got {sorted(set(x_N.tolist()))}")
    if not (np.isfinite(time_N) & (time_N > 0) & (x_N > 0)).all():
        raise PlanError(f"amounts and measured times must be positive, got {x_N.tolist()} and {time_N.tolist()}")
    lines = _candidates(x_N, time_N)
    ratio_CN = (lines[:, :1] + lines[:, 1:] * x_N) / time_N
    best = int(np.argmin(np.abs(np.log(ratio_CN)).sum(axis=1)))
    fixed_s, unit_s = lines[best].tolist()
    error_N = np.abs(ratio_CN[best] - 1)
    return LineFit(fixed_s=fixed_s, unit_s=unit_s, residual=float(error_N.mean()), worst=float(error_N.max()))


def _candidates(x_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
    """(fixed, per unit) of every candidate line, `[C, 2]`."""
    first, second = np.triu_indices(len(x_N), k=1)
    apart = x_N[first] != x_N[second]
    first, second = first[apart], second[apart]
    slope_P = (time_N[second] - time_N[first]) / (x_N[second] - x_N[first])
    pairs = np.stack([time_N[first] - slope_P * x_N[first], slope_P], axis=1)
    origin = np.stack([np.zeros(len(x_N)), time_N / x_N], axis=1)
    return np.concatenate([pairs[(pairs[:, 0] >= 0) & (pairs[:, 1] > 0)], origin])
