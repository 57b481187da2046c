"""History: cold start, forecasts that follow or average, errors, scenarios."""

from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.history import History, HistoryOptions, perturbations
from megatron_smartmoe.spec.arrays import FloatArray


def test_cold_start_expects_even_loads() -> None:
    history = History(2, 4)
    assert (history.forecast_LE() == 0.25).all()
    assert np.isnan(history.update(np.ones((2, 1, 4), np.int64))).all()
    assert history.forecast_error_L.tolist() == [0.0, 0.0]


def test_a_steady_load_is_averaged_and_a_drifting_one_is_followed() -> None:
    rng = np.random.default_rng(0)
    history = History(2, 32)
    steady = rng.lognormal(0, 1, 32)
    for step in range(60):
        drifting = np.roll(np.linspace(1, 9, 32), step // 2)
        counts = [rng.multinomial(2000, p / p.sum()) for p in (steady, drifting)]
        error_L = history.update(np.stack(counts)[:, None])
    forecast_LE = history.forecast_LE()
    assert np.abs(forecast_LE[0] - steady / steady.sum()).sum() < np.abs(counts[0] / 2000 - steady / steady.sum()).sum()
    assert forecast_LE[1] == pytest.approx(counts[1] / 2000, abs=0.02)
    assert error_L == pytest.approx(history.forecast_error_L, abs=0.05)


def test_the_error_is_the_part_of_the_tokens_that_went_elsewhere() -> None:
    history = History(1, 4)
    history.update(np.array([[[4, 0, 0, 0]]]))
    assert history.update(np.array([[[3, 1, 0, 0]]])).tolist() == [0.25]


def test_scenarios_are_shares_with_the_forecast_first() -> None:
    history = History(1, 4, HistoryOptions(window=2, spreads=(1.0, 2.0), micro_batches=2))
    history.update(np.array([[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]]))
    history.update(np.array([[[2, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 4]]]))
    rows_KE = history.scenarios_KE(0)
    assert rows_KE.shape == (1 + 2 + 1 + 2, 4)  # forecast, 2 of 3 micro-batches, the record before, 2 perturbed
    assert rows_KE.sum(axis=1) == pytest.approx(1)
    assert rows_KE[0].tolist() == history.forecast_LE()[0].tolist()
    assert rows_KE[1].tolist() == [1, 0, 0, 0]
    assert rows_KE[2].tolist() == [0, 0, 0, 1]
    assert rows_KE[3].tolist() == [0.5, 0.5, 0, 0]


def test_noise_is_the_same_in_every_call_and_has_its_spread() -> None:
    factors = perturbations((0.1, 0.2), 4096)
    assert np.array_equal(factors, perturbations((0.1, 0.2), 4096))
    assert factors.std(axis=1) == pytest.approx([0.1, 0.2], rel=0.05)
    assert factors.mean(axis=1) == pytest.approx([1, 1], abs=0.01)


def test_a_record_without_tokens_and_one_of_the_wrong_shape() -> None:
    history = History(1, 4)
    history.update(np.zeros((1, 1, 4), np.int64))
    assert np.isfinite(history.scenarios_KE(0)).all()
    with pytest.raises(PlanError, match=r"must be \[1, micro-batches, 4\]"):
        history.update(np.zeros((1, 4), np.int64))


def share_of(counts_E: FloatArray) -> Any:
    return pytest.approx(counts_E / np.sum(counts_E), abs=0.02)


def test_a_jump_is_followed_at_once_and_the_regime_before_is_kept_and_found_again() -> None:
    rng = np.random.default_rng(0)
    base, burst = np.ones(8), np.array([8.0, 1, 1, 1, 1, 1, 1, 1])
    history = History(1, 8, HistoryOptions(regime_records=6))

    def see(popularity: FloatArray) -> FloatArray:
        history.update(rng.multinomial(20_000, popularity / popularity.sum())[None, None])
        return history.scenarios_KE(0)

    calm = [see(base) for _ in range(8)][-1]
    first = see(burst)
    assert history.forecast_LE()[0] == share_of(burst)
    assert len(first) == len(calm) + 1
    assert any(row == share_of(base) for row in first[3:4])  # after the forecast and the two latest records
    assert history.forecast_error_L[0] < 0.02  # a jump does not spoil the choice of average
    see(burst)
    back = see(base)
    assert history.forecast_LE()[0] == share_of(base)
    assert any(row == share_of(burst) for row in back[3:4])
    later = [see(base) for _ in range(8)][-1]
    assert len(later) == len(calm)  # forgotten


def test_a_load_that_always_jumps_is_hard_to_forecast_and_not_a_jump_each_time() -> None:
    rng = np.random.default_rng(0)
    history = History(1, 8)
    for _ in range(20):
        history.update(rng.multinomial(1000, rng.dirichlet(np.ones(8)))[None, None])
    assert history.forecast_error_L[0] > 0.1


def test_a_restored_history_forecasts_and_plans_as_if_it_had_never_stopped() -> None:
    rng = np.random.default_rng(3)
    loads = [rng.multinomial(500, rng.dirichlet(np.ones(16)), size=(3, 6)) for _ in range(12)]
    whole = History(3, 16)
    for step, counts_LME in enumerate(loads):
        if step == 7:
            resumed = History(3, 16)
            resumed.restore({name: array.copy() for name, array in whole.state().items()})
        whole.update(counts_LME)
        if step >= 7:
            resumed.update(counts_LME)
            assert np.array_equal(resumed.forecast_LE(), whole.forecast_LE())
            for layer in range(3):
                assert np.array_equal(resumed.scenarios_KE(layer), whole.scenarios_KE(layer))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"surprise_L": np.zeros(3)}, r"surprise_L of the saved history is \(3,\): must be \(2,\)"),
        ({"total_0_LE": None}, r"total_0_LE of the saved history is missing: must be \(2, 4\)"),
        ({"micro_0_LME": np.zeros((2, 4))}, r"the micro-batches of the saved history have shapes \[\(2, 4\)\]"),
    ],
)
def test_a_state_of_another_shape_is_refused(change: dict[str, Any], text: str) -> None:
    history = History(2, 4)
    history.update(np.ones((2, 3, 4), np.int64))
    state = {name: array for name, array in (history.state() | change).items() if array is not None}
    with pytest.raises(PlanError, match=text):
        History(2, 4).restore(state)
