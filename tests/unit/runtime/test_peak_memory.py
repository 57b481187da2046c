from __future__ import annotations

import numpy as np

from megatron_smartmoe.runtime.peak_memory import GIB, PeakMemory

LIMIT_R = np.full(2, 80.0) * GIB


def notes(*hottest_gib: float) -> list[str | None]:
    memory = PeakMemory()
    return [memory.note(np.array([50.0, each]) * GIB, LIMIT_R) for each in hottest_gib]


def test_a_rise_like_the_last_one_that_would_not_fit_is_warned_of_once() -> None:
    *before, warning, after = notes(30, 60, 68, 75, 79)
    assert [*before, after] == [None] * 4
    assert warning is not None
    expected = "memory: rank 1 peaked at 75.00 of 80.00 GiB, 7.00 GiB more than one log line before: another rise like"
    assert warning.startswith(expected)


def test_a_peak_that_stands_is_not_warned_of() -> None:
    assert notes(*[79.9] * 4) == [None] * 4


def test_the_optimizer_states_of_the_first_step_are_no_rise() -> None:
    assert notes(40, 70, 70) == [None] * 3
