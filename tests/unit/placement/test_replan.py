"""The rule of `auto`: plan anew where history falls short and the new plan pays, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.replan import Replan, ReplanOptions, planned_anew, replans_decision
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

LOAD = np.array([60, 40, 60, 40, 60, 40, 60, 40])  # 4 ranks, 100 tokens each on average


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    slots_RS: IntArray
    busiest: int


def plan_with(replicas: int, busiest: int = 100) -> Made:
    """Homes, and so many replicas that rank 0 feeds."""
    slots_RS = np.concatenate([np.arange(8).reshape(4, 2), np.full((4, 1), -1)], axis=1)
    slots_RS[1 : 1 + replicas, 2] = 0
    return Made(slots_RS=slots_RS, busiest=busiest)


@pytest.mark.parametrize(
    ("held", "replicas", "anew", "is_taken"),
    [
        (180, 1, 100, True),  # the example of the module
        (180, 2, 100, False),  # 90 tokens' worth of transfers for 80 tokens
        (145, 1, 100, False),  # what it saves is what it costs
        (180, 0, 180, False),  # a plan without replicas saves nothing
        (180, 1, 181, False),
    ],
)
def test_a_plan_is_taken_where_it_saves_more_than_it_costs(held: int, replicas: int, anew: int, is_taken: bool) -> None:
    made = plan_with(replicas, anew)
    found = planned_anew(held, LOAD, 4, ReplanOptions(limit=1.01, price=TransferPrice.of_each(45.0)), lambda: made)
    assert found is (made if is_taken else None)


@pytest.mark.parametrize(("held", "is_planned"), [(101, False), (102, True)])
def test_history_that_is_good_enough_is_not_planned_against(held: int, is_planned: bool) -> None:
    asked = []

    def plan() -> Made:
        asked.append(held)
        return plan_with(1)

    planned_anew(held, LOAD, 4, ReplanOptions(limit=1.01), plan)
    assert len(asked) == is_planned


def planner(price_tokens: float = 0.0) -> ReplicaPlanner:
    """One layer with a replica of expert 0 on rank 1, as history has put it."""
    placement = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=4, spare_slots=1)
    slots_LRS = placement.slots_LRS.copy()
    slots_LRS[0, 1, 2] = 0
    options = OnlineOptions(replicas="auto", exact_price=TransferPrice.of_each(price_tokens))
    return ReplicaPlanner(replace(placement, slots_LRS=slots_LRS), 0, options)


def test_the_planner_follows_the_rule() -> None:
    as_before = np.array([120, 40, 20, 20, 50, 50, 50, 50])  # the replica takes what rank 0 has too much
    assert planner().exact_slots(0, as_before) is None
    another = as_before[[4, 5, 6, 7, 0, 1, 2, 3]]  # now expert 4 is hot
    anew_RS = planner().exact_slots(0, another)
    assert anew_RS is not None
    assert 4 in anew_RS[:, 2]
    assert planner(price_tokens=1000.0).exact_slots(0, another) is None


def test_a_decision_names_what_was_planned_anew() -> None:
    slots_RS = plan_with(1).slots_RS
    one = Replan(layer=2, micro_batch=3, load_E=LOAD, slots_RS=slots_RS, before_tokens=180, tokens=100)

    def digests(*replans: Replan) -> tuple[str, str]:
        decision = replans_decision(7, 1, "history", replans, judged=16, price=TransferPrice.of_each(45.0))
        assert (decision.iteration, decision.kind, decision.group, decision.before) == (7, "replans", 1, "history")
        assert decision.why.startswith(f"{len(replans)} of 16 layers")
        return decision.inputs, decision.after

    inputs, after = digests(one)
    assert digests(one) == (inputs, after)
    assert digests(replace(one, slots_RS=plan_with(2).slots_RS))[0] == inputs
    assert digests(replace(one, slots_RS=plan_with(2).slots_RS))[1] != after
    assert digests(replace(one, load_E=LOAD[::-1])) == (digests(replace(one, load_E=LOAD[::-1]))[0], after)
    assert digests(replace(one, load_E=LOAD[::-1]))[0] != inputs
    assert digests(replace(one, micro_batch=2))[1] != after
