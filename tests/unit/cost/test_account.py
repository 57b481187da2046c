"""The regret account on steps whose every second is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.cost.account import Account, account_of
from megatron_smartmoe.cost.fitted import WARM_UP, Count, Part, StepRecord, fit_step
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import FloatArray

TOKEN_S, GROUP_S, CALL_S, PORT_S, REPLICA_S = 2e-4, 3e-3, 1e-3, 5e-5, 4e-3
OUTSIDE_S, PLANNING_S = 0.1, 2e-3


def record_of(
    tokens_NR: Any, *, groups_R: Any = 4, replicas: int = 0, planning_s: float = 0.0, speed: float = 1.0, **fields: Any
) -> StepRecord:
    """Steps of a machine that takes exactly what the constants above say, times `speed`."""
    tokens_NR = np.asarray(tokens_NR, dtype=np.float64)
    shape = tokens_NR.shape
    counts: FloatArray = np.zeros((*shape, len(Count)))
    counts[..., Count.TOKENS] = tokens_NR
    counts[..., Count.GROUPS] = groups_R
    counts[..., Count.CALLS] = 2
    counts[..., Count.PORT_TOKENS] = tokens_NR * 0.75
    counts[..., Count.REPLICAS] = replicas
    counts[..., Count.BUSIEST_TOKENS] = tokens_NR.max(axis=1)[:, None]
    counts[..., Count.BUSIEST_GROUPS] = groups_R
    counts[..., Count.BUSIEST_PORT_TOKENS] = tokens_NR.max(axis=1)[:, None] * 0.75
    seconds: FloatArray = np.zeros((*shape, len(Part)))
    seconds[..., Part.OUTSIDE] = OUTSIDE_S
    seconds[..., Part.EXPERTS] = tokens_NR * TOKEN_S + counts[..., Count.GROUPS] * GROUP_S
    seconds[..., Part.DISPATCH] = 2 * CALL_S + counts[..., Count.PORT_TOKENS] * PORT_S
    seconds[..., Part.REPLICAS] = replicas * REPLICA_S
    seconds[..., Part.PLANNING] = planning_s
    if fields.get("basis") == "gpu":  # ranks wait for the busiest
        seconds[..., Part.DISPATCH] += seconds.sum(axis=2).max(axis=1)[:, None] - seconds.sum(axis=2)
    given = {"basis": "cpu", "stage_R": np.zeros(shape[1], dtype=np.int64), **fields}
    return StepRecord(
        iteration_N=np.arange(1, shape[0] + 1),
        iterations_N=np.ones(shape[0], dtype=np.int64),
        seconds_NRP=seconds * speed,
        counts_NRC=counts,
        **given,
    )


def uneven(rows: int = 12, ranks: int = 4) -> FloatArray:
    return np.random.default_rng(3).integers(300, 900, (rows, ranks)).astype(np.float64)


def seconds_of(account: Account) -> dict[str, float]:
    return {term.name: term.seconds for term in account.terms}


def test_each_cause_becomes_its_own_term_and_nothing_is_left_over() -> None:
    tokens_NR = uneven()
    ideal = record_of(np.full((12, 4), 600.0))
    run = record_of(tokens_NR, groups_R=np.array([4, 5, 6, 7]), replicas=1, planning_s=PLANNING_S)
    account = account_of(run, ideal)
    terms, kept = seconds_of(account), slice(WARM_UP, None)
    busiest_N = run.step_NR[kept].argmax(axis=1)
    tokens_N = tokens_NR[kept][np.arange(len(busiest_N)), busiest_N]
    assert terms["imbalance"] == pytest.approx((tokens_N.mean() - 600) * TOKEN_S, rel=1e-6)
    assert terms["shapes"] == pytest.approx((np.array([4, 5, 6, 7])[busiest_N].mean() - 4) * GROUP_S, rel=1e-6)
    assert terms["all_to_all"] == pytest.approx((tokens_N.mean() - 600) * 0.75 * PORT_S, rel=1e-6)
    assert terms["replicas"] == pytest.approx(REPLICA_S)
    assert terms["planning"] == pytest.approx(PLANNING_S)
    assert terms["migration"] == terms["machine"] == pytest.approx(0, abs=1e-12)
    assert account.unexplained_s == pytest.approx(0, abs=1e-9)
    shares = account.to_json()
    del shares["terms"]["machine"]
    total = shares["share_of_ideal"] + shares["unexplained_share"] + sum(t["share"] for t in shares["terms"].values())
    assert total == pytest.approx(1)


def test_what_no_count_explains_is_unexplained() -> None:
    run, ideal = record_of(uneven()), record_of(np.full((12, 4), 600.0))
    seconds = run.seconds_NRP.copy()
    rank_N = run.step_NR.argmax(axis=1)
    seconds[np.arange(12), rank_N, Part.OUTSIDE] += 0.05  # in the busiest rank alone: no slower machine
    account = account_of(replace(run, seconds_NRP=seconds), ideal)
    assert account.unexplained_s is not None
    assert account.unexplained_s > 0.015
    assert seconds_of(account)["machine"] == pytest.approx(0.0125 / OUTSIDE_S * account.ideal_s, rel=0.1)  # type: ignore[operator]


def test_a_slower_machine_is_a_term_of_its_own() -> None:
    account = account_of(record_of(uneven(), speed=1.2), record_of(np.full((12, 4), 600.0)))
    assert account.ideal_s is not None
    assert seconds_of(account)["machine"] == pytest.approx(0.2 * account.ideal_s)
    assert account.share == pytest.approx(1.2 * account.ideal_s / account.step_s)
    assert account.unexplained_s == pytest.approx(0, abs=1e-9)


def test_stages_that_differ() -> None:
    stage_R = np.array([0, 0, 1, 1])
    ideal, tokens_NR = record_of(np.full((12, 4), 600.0), stage_R=stage_R), np.full((12, 4), 600.0)
    ideal.seconds_NRP[:, 2:, Part.OUTSIDE] += 0.02  # the loss is on the last stage, which the ideal waits for
    tokens_NR[:, 0] = 1000
    run = record_of(tokens_NR, stage_R=stage_R)
    run.seconds_NRP[:, 2:, Part.OUTSIDE] += 0.02
    account = account_of(run, ideal)
    assert seconds_of(account)["pipeline"] == pytest.approx(-0.02)
    assert seconds_of(account)["imbalance"] == pytest.approx(400 * TOKEN_S)
    assert account.unexplained_s == pytest.approx(0, abs=1e-9)


def test_without_an_ideal_the_mean_rank_is_the_measure() -> None:
    run = record_of(uneven())
    account, kept = account_of(run), uneven()[WARM_UP:]
    expected = (kept.max(axis=1) - kept.mean(axis=1)).mean() * TOKEN_S
    assert seconds_of(account)["imbalance"] == pytest.approx(expected)
    assert account.share is None
    assert account.unexplained_s is None
    assert "machine" not in seconds_of(account)
    assert sum(account.split_s) == pytest.approx(account.step_s)


def test_of_an_interval_all_iterations_count_with_the_constants_of_the_run() -> None:
    run = record_of(uneven())
    account = account_of(run, fitted=fit_step(run))
    assert account.iterations == 12
    assert account.step_s == pytest.approx(run.step_NR.max(axis=1).mean())


def test_on_a_gpu_the_busiest_rank_of_each_layer_counts() -> None:
    ideal = record_of(np.full((12, 4), 600.0), basis="gpu")
    account = account_of(record_of(uneven(), basis="gpu"), ideal)
    expected = (uneven()[WARM_UP:].max(axis=1).mean() - 600) * TOKEN_S
    assert seconds_of(account)["imbalance"] == pytest.approx(expected, rel=1e-6)


def test_the_fit_finds_the_constants_and_its_residuals() -> None:
    fitted = fit_step(record_of(uneven(), groups_R=np.array([4, 5, 6, 7]), replicas=2))
    found = (fitted.token_s, fitted.group_s, fitted.call_s, fitted.port_token_s, fitted.replica_s)
    assert found == pytest.approx((TOKEN_S, GROUP_S, CALL_S, PORT_S, REPLICA_S))
    assert fitted.outside_s == pytest.approx((OUTSIDE_S,))
    assert fitted.spread == pytest.approx(0, abs=1e-9)


def test_constants_are_never_negative() -> None:
    run = record_of(uneven())
    falling = run.seconds_NRP.copy()
    falling[..., Part.DISPATCH] = 0.2 - run.counts_NRC[..., Count.PORT_TOKENS] * 1e-4
    fitted = fit_step(replace(run, seconds_NRP=falling))
    assert fitted.port_token_s == 0
    assert fitted.call_s > 0


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"basis": "gpu"}, "run both on one machine"),
        ({"stage_R": np.array([0, 0, 1, 1])}, "launch both alike"),
        ({"micro_batches": 2}, "the ideal has 2 micro-batches, the run 1"),
    ],
)
def test_an_ideal_of_another_launch_is_refused(other: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        account_of(record_of(uneven()), record_of(uneven(), **other))
