"""The verdict on a fault: what is not allowed is found, whatever else looks well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.reliability.fault_job import End
from scripts.reliability.fault_judge import BAD, judge
from scripts.reliability.fault_plan import KINDS, LONG, Fault, draw, places_of

REFERENCE = {iteration: 6.0 - iteration / 100 for iteration in range(1, LONG.iterations + 1)}
WHOLE = list(REFERENCE.items())
GOOD = End(status=(0, 0), struck=True, seconds=3.0, slow_ranks=(), hung=False, lines=("done",))
DIED = replace(GOOD, status=(1, -9), lines=("Traceback", "RuntimeError: Connection closed by peer"))


def fault(kind: str, *, launched: bool = False) -> Fault:
    return Fault(
        number=0,
        kind=kind,
        place=places_of(kind)[0],
        victim=1,
        iteration=2,
        seconds=1.0,
        replicas="exact",
        at=0.5,
        launched=launched,
    )


def outcome(
    kind: str,
    end: End,
    resumed: End | None = None,
    losses: list[tuple[int, float]] = WHOLE,
    *,
    launched: bool = False,
) -> str:
    return judge(fault(kind, launched=launched), end, resumed, losses, REFERENCE, 0.0).outcome


def test_what_is_allowed() -> None:
    assert outcome("pause", GOOD) == "same losses"
    assert outcome("kill", DIED, GOOD) == "stopped"
    refused = replace(GOOD, status=(1, 1), struck=False, lines=("error: iter_0000006/__0_0.distcp is damaged",))
    assert outcome("flipped file", refused, GOOD) == "refused"
    assert outcome("flipped file", replace(GOOD, struck=False)) == "same losses"


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_differs_in_its_last_bit_is_wrong(kind: str) -> None:
    losses = [*WHOLE[:-1], (LONG.iterations, WHOLE[-1][1] * (1 + 2**-52))]
    assert outcome(kind, GOOD, None, losses) == "wrong losses"


def test_a_loss_that_is_missing_is_wrong() -> None:
    assert outcome("pause", GOOD, None, WHOLE[:-1]) == "wrong losses"
    assert outcome("kill", DIED, GOOD, WHOLE[:3]) == "wrong losses"


def test_a_job_that_hangs() -> None:
    assert outcome("pause", replace(GOOD, hung=True, status=(-9, -9))) == "hangs"
    assert outcome("kill", DIED, replace(GOOD, hung=True, status=(-9, -9))) == "hangs"


def test_a_stop_that_says_nothing() -> None:
    assert outcome("disk full", DIED, GOOD) == "unclear"
    assert (
        outcome("truncated file", replace(DIED, struck=False, lines=("EOFError: Ran out of input",)), GOOD) == "unclear"
    )
    assert outcome("kill", replace(DIED, status=(1,)), GOOD, launched=True) == "unclear"
    named = replace(DIED, status=(1,), lines=("smartmoe: rank 1 on here was killed by SIGKILL | saved: iteration 6",))
    assert outcome("kill", named, GOOD, launched=True) == "stopped"
    assert outcome("refuse memory", GOOD) == "unclear"


def test_a_stop_that_takes_too_long() -> None:
    assert outcome("kill", replace(DIED, seconds=60.0), GOOD) == "slow to stop"


def test_a_run_that_cannot_be_resumed() -> None:
    assert outcome("kill", DIED, DIED) == "unclear"


def test_a_fault_that_did_not_strike_proves_nothing() -> None:
    assert outcome("kill", replace(GOOD, struck=False)) == "did not strike"
    assert "did not strike" in BAD


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    def drawn(count: int) -> list[Fault]:
        return draw(count, 3, length=LONG, kinds=list(KINDS), launched_every=8, replicas=("exact", "history"))

    assert drawn(200)[:12] == drawn(12)
    assert {each.kind for each in drawn(40)} == set(KINDS)
    killed = [each.place for each in drawn(200) if each.kind == "kill"]
    assert set(killed) == set(places_of("kill"))  # every point
    assert any(each.launched for each in drawn(200))
