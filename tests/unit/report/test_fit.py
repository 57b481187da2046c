"""Factors fitted to a run: what its steps distinguish is found, what they do not stays uncertain."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_smartmoe.report.fit import busiest_s, fit_factors

SPREAD_G = np.array([0.3, 0.5, 0.5])


def steps(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Terms of 200 steps, of which the first alone varies, and what they took: twice, 1.2 and 1 times as long."""
    rng = np.random.default_rng(seed)
    terms_NG = np.stack([rng.uniform(0.5, 2, 200), np.ones(200), np.full(200, 0.5)], axis=1)
    return terms_NG, terms_NG @ np.array([2.0, 1.2, 1.0]) * (1 + noise * rng.standard_normal(200))


def test_the_term_that_varies_is_found_and_the_others_only_in_sum() -> None:
    fitted = fit_factors(*steps(noise=0.03), SPREAD_G)
    assert fitted.factors_G[0] == pytest.approx(2.0, abs=0.1)
    assert fitted.factors_G[1:] @ [1.0, 0.5] == pytest.approx(1.7, abs=0.1)
    assert fitted.noise == pytest.approx(0.03, rel=0.3)
    deviation_G = np.sqrt(np.diag(fitted.covariance_GG))
    assert deviation_G[0] < 0.05 < deviation_G[1], "one run does not tell the constant terms apart"


def test_a_prediction_is_as_unsure_as_what_it_changes() -> None:
    fitted = fit_factors(*steps(noise=0.03), SPREAD_G)
    as_run, hotter, other = ([1.0, 1.0, 0.5], [2.0, 1.0, 0.5], [1.0, 2.0, 0.5])
    relative = [fitted.deviation_s(np.array(x)) / float(fitted.seconds(np.array(x))) for x in (as_run, hotter, other)]
    assert relative[0] == pytest.approx(fitted.noise, rel=0.1)
    assert relative[1] == pytest.approx(fitted.noise, rel=0.2)
    assert relative[2] > 2 * fitted.noise


def test_a_slow_machine_is_no_error() -> None:
    """A cluster file of a machine that is ten times as fast: the factors are ten times as large."""
    terms_NG, seconds_N = steps(noise=0.0)
    fitted = fit_factors(terms_NG, seconds_N * 10, SPREAD_G)
    assert fitted.seconds(terms_NG) == pytest.approx(seconds_N * 10, rel=0.02)


def test_parts_of_a_step_tell_apart_what_the_step_does_not() -> None:
    """The same steps, and of each the seconds of its second term alone: both constant terms are known then."""
    terms_NG, _ = steps(noise=0.0)
    rng = np.random.default_rng(3)
    part_NG = terms_NG * [0.0, 1.0, 0.0]
    rest_NG = terms_NG - part_NG
    factors_G = np.array([2.0, 1.2, 1.0])
    step_N = terms_NG @ factors_G
    rows_NG = np.concatenate([part_NG, rest_NG])
    seconds_N = rows_NG @ factors_G + 0.01 * np.tile(step_N, 2) * rng.standard_normal(400)
    fitted = fit_factors(rows_NG, seconds_N, SPREAD_G, np.tile(step_N, 2))
    assert fitted.factors_G == pytest.approx(factors_G, abs=0.1)
    assert np.sqrt(np.diag(fitted.covariance_GG)).max() < 0.05
    assert fitted.judged_by(np.array([0.1, -0.1, 5.0])).noise == pytest.approx(0.148, abs=0.001)


def test_outliers_do_not_bend_the_fit() -> None:
    terms_NG, seconds_N = steps(noise=0.01)
    seconds_N[::10] *= 3.0
    fitted = fit_factors(terms_NG, seconds_N, SPREAD_G)
    assert fitted.factors_G[0] == pytest.approx(2.0, abs=0.15)
    assert fitted.noise < 0.03


def test_no_factor_is_negative() -> None:
    """Steps that become shorter as a term grows: that term costs nothing, and the others explain the rest."""
    growing_N = np.linspace(0.5, 2, 50)
    terms_NG = np.stack([growing_N, np.ones(50), np.ones(50)], axis=1)
    fitted = fit_factors(terms_NG, 10 - 3 * growing_N, SPREAD_G)
    assert (fitted.factors_G >= 0).all()
    assert fitted.factors_G[0] == 0


def test_equal_ranks_wait_for_the_one_that_is_slow_by_chance() -> None:
    residuals_MU = np.array([[0.1, -0.1], [-0.1, 0.1]])
    assert busiest_s(np.array([[1.0, 1.0]]), residuals_MU) == pytest.approx(1.1)
    assert busiest_s(np.array([[2.0, 1.0]]), residuals_MU) == pytest.approx(2.0)  # 2.2 and 1.8
    assert busiest_s(np.array([[1.0]]), np.array([[0.1], [0.0], [-0.1]])) == pytest.approx(1.0)
