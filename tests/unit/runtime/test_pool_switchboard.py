"""The switchboard on made-up times: it switches for a gain, keeps a win, reverts a loss, and then waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.pool.switchboard import (
    PoolVerdict,
    StepTimes,
    Switchboard,
    SwitchboardOptions,
    step_seconds,
)

OFF = PoolSetting(homes_interval=0, spare_slots=0, replicas="off", overlap_degree=1)
EXACT = replace(OFF, spare_slots=1, replicas="exact")
HISTORY = replace(OFF, spare_slots=1, replicas="history")
MOE = {OFF: 0.5, EXACT: 0.4, HISTORY: 0.45}  # seconds of a step's MoE layers


def took(step_s: float, noise_s: float = 0.0, iterations: int = 100) -> StepTimes:
    return StepTimes(step_s=step_s, noise_s=noise_s, iterations=iterations)


def board() -> Switchboard:
    return Switchboard(OFF, 0, SwitchboardOptions(cooldown_iterations=100))


def evaluate(at: Switchboard, iteration: int, times: StepTimes, moe: dict[PoolSetting, float] = MOE) -> PoolVerdict:
    return at.evaluate(iteration, times, lambda: moe)


def test_outside_the_layers_nothing_changes() -> None:
    assert step_seconds(MOE, OFF, 1.0) == pytest.approx({OFF: 1.0, EXACT: 0.9, HISTORY: 0.95})


def test_layers_that_are_predicted_to_take_more_than_the_step_leave_nothing_for_the_rest() -> None:
    assert step_seconds(MOE, OFF, 0.1) == MOE


def test_it_switches_to_the_best_and_keeps_what_holds() -> None:
    at = board()
    switch = evaluate(at, 100, took(1.0))
    assert switch.switched
    assert at.now == EXACT
    assert switch.predicted_gain_s == pytest.approx(0.1)
    measured, predicted = "measured 1.000 s per step", "predicted 0.900 s (10.0% less)"
    assert switch.why == f"homes0-K0-off-ov1: {measured}; homes0-K1-exact-ov1: {predicted}"
    best, other, now = switch.candidates
    assert [one.name for one in (best, other, now)] == [EXACT.key, HISTORY.key, OFF.key]
    assert [one.chosen for one in (best, other, now)] == [True, False, False]
    assert [one.step_s for one in (best, other, now)] == pytest.approx([0.9, 0.95, 1.0])
    assert [one.gain_s for one in (best, other, now)] == pytest.approx([0.1, 0.05, 0.0])
    kept = evaluate(at, 200, took(0.93))
    assert not kept.switched
    assert kept.is_decision
    assert kept.realised_gain_s == pytest.approx(0.07)
    assert kept.why == (
        "kept: a step takes 0.93 s, before the switch 1 s (predicted +0.1 s, measured +0.07 s, noise 0 s)"
    )
    stays = evaluate(at, 300, took(0.93), {OFF: 0.4, EXACT: 0.395, HISTORY: 0.45})
    assert not stays.is_decision
    assert (at.now, stays.reason) == (EXACT, "margin")


def test_a_loss_is_reverted_and_the_cooldown_doubles_each_time() -> None:
    at = board()
    only = {OFF: 0.5, EXACT: 0.4}
    evaluate(at, 100, took(1.0), only)
    back = evaluate(at, 200, took(1.2), only)
    assert (back.before, back.setting, at.now, back.reason) == (EXACT, OFF, OFF, "loss")
    assert back.realised_gain_s == pytest.approx(-0.2)
    assert back.why == (
        "reverted: a step takes 1.2 s, before the switch 1 s (predicted +0.1 s, measured -0.2 s, noise 0 s); "
        "cooldown of homes0-K1-exact-ov1: 200 iterations"
    )
    assert not evaluate(at, 300, took(1.0), only).switched
    assert evaluate(at, 400, took(1.0), only).switched  # 200 iterations later
    assert "cooldown of homes0-K1-exact-ov1: 400 iterations" in evaluate(at, 500, took(1.2), only).why
    tried = [iteration for iteration in range(600, 1000, 100) if evaluate(at, iteration, took(1.0), only).switched]
    assert tried == [900]


def test_a_setting_that_won_has_no_record_of_losses() -> None:
    at = board()
    only = {OFF: 0.5, EXACT: 0.4}
    evaluate(at, 100, took(1.0), only)
    evaluate(at, 200, took(1.2), only)
    assert evaluate(at, 400, took(1.0), only).switched
    evaluate(at, 500, took(0.9), only)
    back = {OFF: 0.4, EXACT: 0.5}
    assert evaluate(at, 600, took(1.0), back).setting == OFF
    evaluate(at, 700, took(0.9), back)
    assert evaluate(at, 800, took(1.0), only).setting == EXACT
    assert "cooldown of homes0-K1-exact-ov1: 200 iterations" in evaluate(at, 900, took(1.2), only).why


def test_the_next_best_is_taken_while_the_best_is_in_cooldown() -> None:
    at = board()
    evaluate(at, 100, took(1.0))
    evaluate(at, 200, took(1.2))
    assert evaluate(at, 300, took(1.0)).setting == HISTORY


@pytest.mark.parametrize(
    ("after", "keeps"),
    [
        (took(1.015), True),  # within the tolerance of 2%
        (took(1.03), False),
        (took(1.05, noise_s=0.02), True),  # two standard errors of 0.02 are 0.04, and the tolerance
        (took(1.07, noise_s=0.02), False),
    ],
)
def test_noise_is_no_loss(after: StepTimes, keeps: bool) -> None:
    at = board()
    evaluate(at, 100, took(1.0))
    assert evaluate(at, 200, after).switched is not keeps


def test_it_waits_for_enough_steps_before_a_verdict_and_for_the_run_to_settle() -> None:
    at = board()
    assert evaluate(at, 10, took(1.0)).reason == "settling"
    evaluate(at, 100, took(1.0))
    verdict = evaluate(at, 102, took(2.0, iterations=2))
    assert (verdict.setting, verdict.reason) == (EXACT, "trial")
    assert verdict.why == "2 steps timed since the switch, 5 are needed"


def test_a_pool_never_swings_between_two_settings() -> None:
    """The model prefers whichever is not in force: one trial, one revert, then ever longer cooldowns."""
    at, switches = board(), 0
    for iteration in range(100, 20_000, 100):
        other = EXACT if at.now == OFF else OFF
        switches += evaluate(at, iteration, took(1.0 if at.now == OFF else 1.1), {at.now: 0.5, other: 0.4}).switched
    assert switches <= 2 * 8


def test_a_checkpoint_in_between_is_not_the_settings_fault() -> None:
    measured = StepTimes.of([0.1, 0.11, 0.1, 30.0, 0.09])
    assert measured.step_s == 0.1
    assert measured.noise_s == pytest.approx(1.2533 * 1.4826 * 0.01 / 5**0.5)
