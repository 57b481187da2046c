"""The soak's judgement: a leak, a slower step, a loss that went elsewhere are found."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.reliability.soak_judge import Claim, SoakRun, holdings

STEPS = 5000


def run(**per_step: float) -> SoakRun:
    """One rank that holds the same all the time, plus so much per step."""
    samples: list[dict[str, Any]] = []
    cpu_s = 0.0
    for iteration in range(10, STEPS + 1, 10):
        cpu_s += 10 * (0.02 + per_step.get("cpu_s", 0.0) * iteration)
        held = {
            "rss_bytes": int(7e8 + per_step.get("rss_bytes", 0.0) * iteration),
            "threads": int(73 + per_step.get("threads", 0.0) * iteration),
            "files": int(140 + per_step.get("files", 0.0) * iteration),
            "groups": int(24 + per_step.get("groups", 0.0) * iteration),
        }
        samples.append({"iteration": iteration, "pid": 1, "cpu_s": cpu_s, **held})
    return SoakRun(name="all", losses={}, samples=[samples], decisions=[], copies={})


def broken(claims: list[Claim]) -> list[str]:
    return [claim.name for claim in claims if not claim.holds]


def test_a_run_that_holds_the_same() -> None:
    assert broken(holdings(run())) == []
    assert broken(holdings(run(rss_bytes=500))) == []  # what the summary keeps of each step


@pytest.mark.parametrize(
    ("key", "per_step", "claim"),
    [
        ("rss_bytes", 4096, "all: memory"),
        ("threads", 0.001, "all: threads"),
        ("files", 0.001, "all: open files"),
        ("groups", 0.001, "all: process groups"),
        ("cpu_s", 1e-6, "all: CPU time per step"),
    ],
)
def test_what_grows_is_found(key: str, per_step: float, claim: str) -> None:
    assert broken(holdings(run(**{key: per_step}))) == [claim]


def test_processes_that_resumed_are_compared_each_by_itself() -> None:
    """The second process of a run starts with less memory than the first ended with: that is no leak."""
    whole = run()
    first = [{**sample, "rss_bytes": 7e8} for sample in whole.samples[0][:250]]
    second = [{**sample, "pid": 2, "rss_bytes": 9e8} for sample in whole.samples[0][250:]]
    resumed = SoakRun(name="all", losses={}, samples=[[*first, *second]], decisions=[], copies={})
    assert broken(holdings(resumed)) == []
