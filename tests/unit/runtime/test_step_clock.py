from __future__ import annotations

import itertools

import pytest
import torch

from megatron_smartmoe.cost.fitted import Part
from megatron_smartmoe.runtime import step_clock
from megatron_smartmoe.runtime.step_clock import StepClock, has_passed, seconds_of
from tests.support import cuda_events


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StepClock:
    """A clock that is a second later at each reading."""
    ticks = itertools.count()
    monkeypatch.setattr(step_clock.time, "thread_time", lambda: float(next(ticks)))
    return StepClock()


def test_parts_add_up_to_the_step(clock: StepClock) -> None:
    clock.start(on_gpu=False)  # 0
    clock.enter(Part.DISPATCH)  # 1
    clock.enter(Part.EXPERTS)  # 2
    with clock.within(Part.REPLICAS), clock.within(Part.REPLICAS):  # 3; the same part again: no reading
        pass
    clock.enter(Part.OUTSIDE)  # 5, after the return to EXPERTS at 4
    clock.pause()  # 6
    clock.enter(Part.EXPERTS)  # an evaluation is no part of the step
    clock.resume()  # 7
    with clock.within(Part.PLANNING):  # 8
        pass
    marks = clock.stop()  # 10, after the return to OUTSIDE at 9
    assert seconds_of(marks) == [1 + 1 + 1 + 1, 1, 1 + 1, 1, 1, 0]
    assert not clock.is_running
    assert clock.stop() == []


def test_a_clock_that_is_stopped_reads_nothing(clock: StepClock) -> None:
    with clock.within(Part.PLANNING):
        clock.enter(Part.EXPERTS)
    clock.pause()
    clock.resume()
    assert clock.stop() == []


def test_a_part_that_fails_ends_all_the_same(clock: StepClock) -> None:
    clock.start(on_gpu=False)
    with pytest.raises(RuntimeError), clock.within(Part.MIGRATION):
        raise RuntimeError
    assert seconds_of(clock.stop()) == [2, 0, 0, 0, 0, 1]


def test_a_device_is_timed_by_events_that_pass_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", cuda_events.Event)
    clock = StepClock()
    clock.start(on_gpu=True)
    clock.enter(Part.EXPERTS)
    with clock.within(Part.REPLICAS):
        pass
    marks = clock.stop()
    times_s = [event._at_s for _, event in marks]
    assert not has_passed(marks)
    with pytest.raises(RuntimeError, match="not ready"):
        seconds_of(marks)
    cuda_events.synchronize()
    assert has_passed(marks)
    seconds = seconds_of(marks)
    assert seconds[Part.OUTSIDE] == pytest.approx(times_s[1] - times_s[0])
    assert seconds[Part.REPLICAS] == pytest.approx(times_s[3] - times_s[2])
    assert sum(seconds) == pytest.approx(times_s[-1] - times_s[0])
