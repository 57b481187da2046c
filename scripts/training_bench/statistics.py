"""Ratios of variants over rounds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Steps = NDArray[np.float64]  # one value per counted step of a run
RESAMPLES, SEED, LEVEL = 4000, 7, 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two variants.

    Attributes:
        value: median over the rounds, of each the ratio of the medians of its steps.
        low, high: bounds of the bootstrap interval; NaN with a single round, whose spread says nothing about runs.
    """

    value: float
    low: float
    high: float


def ratio(over: Sequence[Steps], under: Sequence[Steps]) -> Ratio:
    """The ratio of two variants, whose runs are paired by round.

    The interval is that of a bootstrap in two stages: rounds are drawn with replacement, and in each of them steps of
    either run. Runs of one kind differ more than the steps of a run: a bootstrap over all steps would be too narrow.
    """
    over_RS, under_RS = np.stack(over), np.stack(under)
    value = float(np.median(np.median(over_RS, axis=1) / np.median(under_RS, axis=1)))
    if len(over_RS) < 2:
        return Ratio(value=value, low=float("nan"), high=float("nan"))
    rng = np.random.default_rng(SEED)
    rounds_BR = rng.integers(0, len(over_RS), (RESAMPLES, len(over_RS)))
    found_BR = _drawn_medians(over_RS, rounds_BR, rng) / _drawn_medians(under_RS, rounds_BR, rng)
    low, high = np.quantile(np.median(found_BR, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(value=value, low=float(low), high=float(high))


def _drawn_medians(steps_RS: Steps, rounds_BR: NDArray[np.int64], rng: np.random.Generator) -> Steps:
    """Median of steps drawn with replacement from each drawn round."""
    steps_BRS = rng.integers(0, steps_RS.shape[1], (*rounds_BR.shape, steps_RS.shape[1]))
    return np.asarray(np.median(steps_RS[rounds_BR[:, :, None], steps_BRS], axis=2))
