"""The line through measured times: exact where the points are, unmoved by a few that are not."""

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_smartmoe.calibrate.line import fit_line
from megatron_smartmoe.errors import PlanError

SIZES = (1e3, 1e4, 1e5, 1e6, 1e7, 1e8)


def times(fixed_s: float, unit_s: float) -> list[float]:
    return [fixed_s + size * unit_s for size in SIZES]


@pytest.mark.parametrize(("fixed_s", "unit_s"), [(5e-6, 2e-12), (1e-4, 1e-9), (0.0, 1e-9)])
def test_an_exact_line_is_recovered(fixed_s: float, unit_s: float) -> None:
    fit = fit_line(SIZES, times(fixed_s, unit_s))
    assert (fit.fixed_s, fit.unit_s) == (pytest.approx(fixed_s, abs=1e-12), pytest.approx(unit_s))
    assert fit.residual == pytest.approx(0, abs=1e-9)
    assert not fit.poor
    assert fit.at(1e6) == pytest.approx(fixed_s + 1e6 * unit_s)


@pytest.mark.parametrize("spoilt", [(0,), (5,), (1, 4), (0, 3)])
def test_points_that_are_off_do_not_move_it(spoilt: tuple[int, ...]) -> None:
    time_s = times(1e-4, 1e-9)
    for at in spoilt:
        time_s[at] *= 4
    fit = fit_line(SIZES, time_s)
    assert (fit.fixed_s, fit.unit_s) == (pytest.approx(1e-4), pytest.approx(1e-9))
    assert fit.worst == pytest.approx(0.75)  # the line is a quarter of what was measured
    assert fit.residual == pytest.approx(0.75 * len(spoilt) / len(SIZES))
    assert fit.poor


def test_noise_moves_it_by_about_as_much() -> None:
    draw = np.random.default_rng(7)
    time_s = np.array(times(1e-4, 1e-9)) * draw.uniform(0.97, 1.03, len(SIZES))
    fit = fit_line(SIZES, time_s.tolist())
    assert fit.fixed_s == pytest.approx(1e-4, rel=0.05)
    assert fit.unit_s == pytest.approx(1e-9, rel=0.05)
    assert 0 < fit.residual < fit.worst < 0.06


def test_no_cost_is_negative() -> None:
    """Times that bend upwards would put the fixed cost below zero."""
    fit = fit_line((1, 2, 4), (1.0, 3.0, 9.0))
    assert fit.fixed_s >= 0
    assert fit.unit_s > 0


def test_times_that_do_not_grow_make_a_poor_line() -> None:
    fit = fit_line((1, 2, 4), (1.0, 1.0, 1.0))
    assert fit.unit_s > 0
    assert fit.poor


def test_a_line_that_is_far_too_fast_is_not_preferred() -> None:
    """Two points that agree on a rate that the largest message does not come near to."""
    fit = fit_line((1e3, 65e3, 1e6, 4e6), (1.5e-3, 1.04e-3, 1.19e-3, 4.75e-3))
    assert 0.5 * 4e6 / 4.75e-3 < 1 / fit.unit_s < 2 * 4e6 / 4.75e-3


@pytest.mark.parametrize(
    ("units", "time_s", "message"),
    [
        ([8.0, 8.0], [1.0, 2.0], r"at least two different amounts, got \[8.0\]"),
        ([1.0, 2.0], [0.0, 1.0], "must be positive"),
        ([1.0, 2.0], [1.0, float("nan")], "must be positive"),
        ([0.0, 2.0], [1.0, 1.0], "must be positive"),
    ],
)
def test_what_makes_no_line_is_refused(units: Sequence[float], time_s: Sequence[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fit_line(units, time_s)
