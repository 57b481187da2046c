"""Plans of every rule as `scripts/bench_imbalance.py` runs them: no token is lost or goes where its expert is not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_smartmoe.simulate.imbalance import BenchSizes, make_case
from megatron_smartmoe.spec.placement import EMPTY
from scripts.training_bench.rule_plans import EVEN, NONE, RulePlans, Sizes, plans_of

SIZES = Sizes(ranks=4, experts=16, top_k=2, tokens=64, hidden=64, ffn=64, spare_slots=2)
RULES = {
    "smartmoe-history",
    "smartmoe-exact",
    "smartmoe-auto",
    "fastermoe",
    "echo",
    "ultraep",
    "llep",
    "moonep",
    "lplb",
}


@pytest.fixture(scope="module")
def plans() -> dict[str, RulePlans]:
    bench = BenchSizes(num_experts=16, top_k=2, tokens=64, num_ranks=4, steps=6, micro_batches=1, seed=1)
    return plans_of(make_case("compatible", "W1_hot_expert_set", bench).trace, SIZES, warmup=2, cluster="cpu")


def test_every_token_goes_to_a_slot_of_its_expert(plans: dict[str, RulePlans]) -> None:
    assert set(plans) == {EVEN, NONE} | RULES
    for name, rule in plans.items():
        assert len(rule.steps) == 4
        for step in rule.steps:
            for expert in range(SIZES.experts):
                sent_R = step.sent_RRS[:, step.slots_RS == expert].sum(axis=1)
                assert sent_R.tolist() == step.counts_RE[:, expert].tolist(), name
            assert not step.sent_RRS[:, step.slots_RS == EMPTY].any()


def test_rules_differ_in_balance_and_in_when_replicas_travel(plans: dict[str, RulePlans]) -> None:
    assert plans[NONE].max_over_mean > 2
    assert plans["moonep"].max_over_mean == pytest.approx(1.0)
    assert plans["smartmoe-exact"].max_over_mean < 1.1
    assert {step.fetch for step in plans[NONE].steps} == {step.fetch for step in plans[EVEN].steps} == {"none"}
    assert {step.fetch for step in plans["smartmoe-history"].steps} == {"ahead"}
    assert {step.fetch for step in plans["ultraep"].steps} == {"now"}


def test_an_even_load_is_even_over_ranks_whatever_is_left_over(plans: dict[str, RulePlans]) -> None:
    for step in plans[EVEN].steps:
        load_R = step.sent_RRS.sum(axis=(0, 2))
        assert np.ptp(load_R) <= SIZES.ranks  # of each source, one token at most
        assert np.array_equal(step.counts_RE.sum(axis=1), plans[NONE].steps[0].counts_RE.sum(axis=1))
