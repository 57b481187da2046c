"""Which rank the watchdog names, and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_smartmoe.runtime.progress import Phase
from megatron_smartmoe.runtime.watchdog.nodes import aged, report_from_json, report_to_json
from megatron_smartmoe.runtime.watchdog.verdict import LONG_S, RankReport, Reason, Verdict, judge
from tests.support.progress import report

EP, PP = 7, 8  # keys of process groups


def verdict_of(*reports: RankReport) -> Verdict:
    verdict = judge(reports)
    assert verdict is not None
    return verdict


def named(*reports: RankReport) -> tuple[int, Reason]:
    verdict = verdict_of(*reports)
    return verdict.report.progress.rank, verdict.reason


def waits(rank: int, number: int, groups: dict[int, int], **changes: Any) -> RankReport:
    return report(rank, groups, is_waiting=True, number=number, **changes)


def test_a_step_within_its_limit_is_no_matter() -> None:
    assert judge([report(0, phase_s=9.4), report(1, phase_s=9.4)]) is None  # 3 x 0.5 s + 8 s = 9.5 s
    assert judge([report(0, phase_s=9.6), report(1, phase_s=9.4)]) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"median_step_s": None},
        {"phase": Phase.STARTING},
        {"phase": Phase.SAVE},
        {"phase": Phase.EVALUATION},
        {"phase": Phase.COMPILATION},
        {"phase": Phase.CHANGES},
        {"phase": Phase.ENDING},
    ],
    ids=str,
)
def test_what_is_no_ordinary_step_has_a_limit_of_its_own_for_all_ranks(changes: dict[str, Any]) -> None:
    assert judge([report(0, phase_s=9000.0), report(1, phase_s=9000.0, **changes)]) is None  # something moved 19 s ago
    verdict = verdict_of(report(0, still_s=LONG_S + 1), report(1, still_s=LONG_S + 2, **changes))
    assert verdict.median_step_s is None
    assert verdict.line.startswith("no progress for 302 s; the slowest rank is 1 of 2")


def test_what_was_before_the_watchdog_watched_is_not_held_against_anybody() -> None:
    assert judge([report(0)], watched_s=5.0) is None
    assert judge([report(0)], watched_s=15.0) is not None


def test_the_rank_that_has_not_joined_is_named() -> None:
    assert named(waits(0, 5, {EP: 5}), report(1, {EP: 4})) == (1, Reason.BUSY)
    assert named(report(0, {EP: 4}), waits(1, 5, {EP: 5})) == (0, Reason.BUSY)


def test_the_end_of_a_chain_is_named() -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in another; 3 does not wait and holds nobody up."""
    chain = [
        waits(0, 5, {EP: 5}),
        waits(1, 9, {EP: 4, PP: 9}, group_key=PP),
        report(2, {PP: 8}, still_s=10.0),
        report(3, still_s=19.0),
    ]
    assert named(*chain) == (2, Reason.BUSY)


def test_the_sender_of_an_awaited_message_is_named() -> None:
    assert named(report(0, still_s=30.0), waits(1, 0, {}, operation="receive", peer=2), report(2)) == (2, Reason.BUSY)


def test_where_hosts_do_not_wait_the_one_behind_in_its_groups_is_named() -> None:
    """NCCL: the host posts and goes on until the device has to be waited for."""
    assert named(report(0, {EP: 6}), report(1, {EP: 4}), report(2, {EP: 6})) == (1, Reason.BUSY)


def test_an_earlier_iteration_is_behind_whatever_was_posted() -> None:
    assert named(report(0, {EP: 6}, iteration=40), report(1, {EP: 4})) == (0, Reason.BUSY)


def test_state_of_the_process_counts_before_everything_else() -> None:
    """A stopped rank may have posted before it was stopped, so that all seem to wait in the same operation."""
    assert named(waits(0, 5, {EP: 5}, still_s=30.0), waits(1, 5, {EP: 5}, state="T")) == (1, Reason.STOPPED)
    assert named(report(0, {EP: 4}, state="T"), waits(1, 5, {EP: 5}, state=None)) == (1, Reason.GONE)
    assert named(report(0, state=None), report(1, state="Z"), report(2, silent_s=6.0)) == (2, Reason.SILENT)


def test_all_wait() -> None:
    verdict = verdict_of(waits(0, 5, {EP: 5}, still_s=18.0), waits(1, 5, {EP: 5}, host="beta", node=1))
    assert (verdict.report.progress.rank, verdict.reason) == (1, Reason.ALL_WAIT)
    assert verdict.line.endswith(
        "every rank waits in an operation that the others have joined: look at the network of alpha, beta"
    )


def test_a_job_that_has_ended_holds_nothing_up() -> None:
    assert judge([]) is None
    assert judge([report(0, state=None), report(1, state="Z")]) is None
    done = report(0, state=None, phase=Phase.ENDING, still_s=900.0)
    assert judge([done, report(1, phase_s=1.0)]) is None


def test_a_slow_rank_is_named_by_how_little_it_waited() -> None:
    ranks = [
        waits(0, 5, {EP: 5}, still_s=0.2, waited_s=18.0),
        report(1, {EP: 4}, still_s=0.5, waited_s=1.5),
        waits(2, 5, {EP: 5}, still_s=0.1, waited_s=17.0),
    ]
    verdict = verdict_of(*ranks)
    assert (verdict.report.progress.rank, verdict.reason) == (1, Reason.SLOW)
    assert verdict.line == (
        "this step has taken 20.0 s, the median step takes 0.50 s; the slowest rank is 1 of 3 (pid 1001 on alpha): "
        "layer 3, backward pass, after an all-to-all (expert model parallel group); it is slow but moves, and "
        "training continues (it has waited 1.5 s for others in this step, another rank 18.0 s)"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"state": "R"}, "it is computing, and 1 rank waits in a collective"),
        ({"state": "D"}, "it waits for a disk or a file system, and 1 rank waits in a collective"),
        ({"state": "S"}, "it is outside the collectives, and 1 rank waits in a collective"),
        ({"state": "T"}, "it is stopped by a signal, and 1 rank waits in a collective; kill -CONT 1001 continues it"),
        ({"state": None}, "its process has ended"),
        ({"silent_s": 12.0}, "its node has not answered for 12 s: look at the host and at its network"),
    ],
    ids=str,
)
def test_the_line_says_why(changes: dict[str, Any], text: str) -> None:
    line = verdict_of(waits(0, 5, {EP: 5}), report(1, {EP: 4}, **changes)).line
    assert line.endswith(f"layer 3, backward pass, after an all-to-all (expert model parallel group); {text}")


def test_reports_travel_as_json() -> None:
    sent = waits(1, 5, {EP: 5, PP: 2}, host="beta", node=1)
    assert report_from_json(json.loads(json.dumps(report_to_json(sent)))) == sent
    with pytest.raises(ValueError, match="not a report of a watchdog"):
        report_from_json({"host": "alpha"})


def test_a_report_ages() -> None:
    old = aged(report(0, phase_s=5.0, still_s=4.0), 7.0)
    assert (old.progress.phase_s, old.progress.still_s, old.silent_s) == (12.0, 11.0, 7.0)
