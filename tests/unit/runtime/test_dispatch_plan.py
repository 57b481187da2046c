"""One call plans a micro-batch: it must equal the same plan made step by step, to the last token."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.runtime.replicas.dispatch_plan import (
    DispatchPlan,
    DispatchPlanner,
    ExactOptions,
    PlanBuffer,
    RankView,
    plan_in_steps,
)
from megatron_smartmoe.runtime.replicas.split import homes_only, replicas_of
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.ops.test_placement import needs_library, random_load

pytestmark = needs_library


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, number + 1) if number % n == 0])


def with_replicas(rng: np.random.Generator, slots_RS: IntArray, home_slots: int) -> IntArray:
    """Some replicas, each on a rank that does not hold the expert."""
    slots_RS = slots_RS.copy()
    for row in slots_RS:
        for slot in range(home_slots, len(row)):
            expert = int(rng.integers(slots_RS.shape[0] * home_slots))
            if rng.random() < 0.7 and expert not in row:
                row[slot] = expert
    return slots_RS


LEGS = st.builds(
    LegPrice,
    inside_tokens=st.sampled_from([0.0, 0.1, 3.0, 1e3, 1e9]),
    between_tokens=st.sampled_from([0.0, 3.0, 1e3]),
    hidden_tokens=st.sampled_from([0.0, 2.0, 100.0]),
)


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[RankView, torch.Tensor, IntArray, ExactOptions | None]:
    """A group and a rank of it, counts `[R, P, E]`, slots, and perhaps replicas to be planned from the counts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.one_of(st.integers(1, 8), st.integers(1, 40)))
    home_slots, spare, tp_size = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    view = RankView(
        num_ranks=num_ranks,
        tp_size=tp_size,
        num_experts=num_ranks * home_slots,
        num_slots=home_slots + spare,
        num_nodes=draw(divisors(num_ranks)),
        rank=draw(st.integers(0, num_ranks - 1)),
        tp_rank=draw(st.integers(0, tp_size - 1)),
    )
    counts = random_load(rng, num_ranks * tp_size, view.num_experts).astype(np.int64)
    if rng.random() < 0.2:  # some ranks without tokens
        counts[rng.random(len(counts)) < 0.5] = 0
    slots_RS = with_replicas(rng, homes_only(view.num_experts, num_ranks, spare), home_slots)
    exact = ExactOptions(
        used_slots=draw(st.integers(0, spare)),
        num_nodes=draw(divisors(num_ranks)),
        or_group=draw(st.booleans()),
        price=TransferPrice(fetch=draw(LEGS), back=draw(LEGS)),
        limit=draw(st.sampled_from([1.0, 1.01, 1.5, 4.0])),
    )
    counts_RPE = torch.from_numpy(counts).view(num_ranks, tp_size, -1)
    return view, counts_RPE, slots_RS, draw(st.sampled_from([exact, None]))


def content(plan: DispatchPlan) -> dict[str, Any]:
    """The plan as plain lists and numbers."""
    values = {**vars(plan), **vars(plan.load)}
    del values["load"]
    # the segments without the empty ones at the end
    length_N, shift_N = values["segments_2N"].tolist()
    num_segments = int((plan.slots_RS != EMPTY).sum())
    assert not any(length_N[num_segments:])
    values["segments_2N"] = [length_N[:num_segments], shift_N[:num_segments]]
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}


@given(micro_batches())
@settings(deadline=None, max_examples=250)
def test_one_call_is_the_steps(case: tuple[RankView, torch.Tensor, IntArray, ExactOptions | None]) -> None:
    view, counts_RPE, slots_RS, exact = case
    before = slots_RS.copy()
    expected = content(plan_in_steps(view, counts_RPE, slots_RS, exact))
    planner = DispatchPlanner(view)
    for _ in range(2):  # the buffer is used again
        assert content(planner.plan(counts_RPE, slots_RS, exact)) == expected
    assert np.array_equal(slots_RS, before)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_counts_up_to_the_largest(spare: int) -> None:
    """2^63 - 1 tokens in all, on one expert, on one rank's, and spread; prices and limits are compared exactly."""
    view = RankView(num_ranks=4, tp_size=1, num_experts=8, num_slots=2 + spare, num_nodes=2, rank=3, tp_rank=0)
    most, homes_RS = 2**63 - 1, homes_only(8, 4, spare)
    for load in ([most] + [0] * 7, [most - 3, 1, 1, 1] + [0] * 4, [most // 8] * 8, [most // 8 + 1] * 7 + [0]):
        for price_tokens in (0.0, float(most) / 2, float(most)):
            counts_RPE = torch.zeros(4, 1, 8, dtype=torch.int64)
            counts_RPE[1, 0] = torch.tensor(load)
            exact = ExactOptions(used_slots=spare, price=TransferPrice.of_each(price_tokens), limit=1.0)
            found = DispatchPlanner(view).plan(counts_RPE, homes_RS, exact)
            assert content(found) == content(plan_in_steps(view, counts_RPE, homes_RS, exact))


def test_a_rank_knows_its_replicas() -> None:
    slots_RS = np.array([[0, 1, 5], [2, 3, 0], [4, 5, EMPTY], [6, 7, 0]])
    everybody = replicas_of(slots_RS, 2)
    assert [(r.expert, r.home_rank, r.home_slot, r.rank, r.slot) for r in everybody] == [
        (5, 2, 1, 0, 0),
        (0, 0, 0, 1, 0),
        (0, 0, 0, 3, 0),
    ]
    for rank in range(4):
        assert replicas_of(slots_RS, 2, rank) == tuple(r for r in everybody if rank in (r.home_rank, r.rank))


VIEW = RankView(num_ranks=2, tp_size=1, num_experts=4, num_slots=3, num_nodes=1, rank=0, tp_rank=0)
ARGUMENTS: dict[str, Any] = {
    "counts_RPE": torch.ones(2, 1, 4, dtype=torch.int64),
    "slots_RS": torch.tensor([[0, 1, -1], [2, 3, -1]]),
    "home_slots": 2,
    "num_nodes": 1,
    "rank": 0,
    "tp_rank": 0,
    "used_slots": 1,
    "scope_nodes": 1,
    "or_group": False,
    "limit": 1.01,
    "price_23": torch.zeros(2, 3, dtype=torch.float64),
    "plan": PlanBuffer(VIEW, pinned=False).whole,
}
RULE = "it must be one of the 4 experts that the rank does not hold already, or -1. Pass a valid placement"
ERRORS = [
    ("counts_RPE", torch.ones(2, 1, 4), "counts_RPE.dtype = float32: it must be int64"),
    ("counts_RPE", torch.ones(2, 4).long(), "counts_RPE.shape = [2, 4]: it must be [R, P, E], none of them 0"),
    ("counts_RPE", torch.tensor([[[0, 1, 0, 0]], [[0, 0, -5, 0]]]), "counts_RPE[1, 2] = -5: a number of tokens is at"),
    ("counts_RPE", torch.full((2, 1, 4), 2**62), "counts_RPE = counts that add up to more than 9223372036854775807"),
    ("counts_RPE", torch.ones(2, 1, 8).long()[:, :, ::2], "counts_RPE: it must be contiguous"),
    ("slots_RS", torch.tensor([[0, 1, -1]]), "slots_RS.shape = [1, 3]: it must be [R, S] with R = 2"),
    (
        "slots_RS",
        torch.tensor([[0, 1, -1], [3, 2, -1]]),
        "slots_RS[1, 0] = 3: it must be 2, since experts are numbered",
    ),
    ("slots_RS", torch.tensor([[0, 1, -1], [2, 3, 2]]), f"slots_RS[1, 2] = 2: {RULE}"),
    ("slots_RS", torch.tensor([[0, 1, 4], [2, 3, -1]]), f"slots_RS[0, 2] = 4: {RULE}"),
    ("home_slots", 1, "home_slots = 1: it must be E / R = 4 / 2, and at most S = 3"),
    ("num_nodes", 3, "num_nodes = 3: it must divide R = 2"),
    ("scope_nodes", 0, "scope_nodes = 0: it must divide R = 2"),
    ("rank", 2, "rank = 2: it must be at least 0 and below R = 2"),
    ("tp_rank", -1, "tp_rank = -1: it must be at least 0 and below P = 1"),
    ("used_slots", 2, "used_slots = 2: it must be in 0..1, the spare slots of a rank"),
    ("plan", torch.zeros(5, dtype=torch.int64), "plan.shape = [5]: it must be [48]"),
]


@pytest.mark.parametrize(("name", "value", "text"), ERRORS)
def test_errors(name: str, value: Any, text: str) -> None:
    arguments = {**ARGUMENTS, "slots_RS": ARGUMENTS["slots_RS"].clone(), name: value}
    with pytest.raises(RuntimeError) as caught:
        ops.plan_dispatch(*arguments.values())
    assert str(caught.value).startswith(text)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.smartmoe.plan_dispatch.default, tuple(ARGUMENTS.values()))


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is free while the plan is made: here for some tens of milliseconds."""
    rng = np.random.default_rng(0)
    view = replace(VIEW, num_ranks=512, num_experts=4096, num_slots=10, tp_size=4)
    planner, homes_RS = DispatchPlanner(view), homes_only(4096, 512, 2)
    counts_RPE = torch.from_numpy(rng.integers(0, 1000, (512, 4, 4096)))
    running, ended, turns = threading.Event(), threading.Event(), list[int]()

    def count() -> None:
        while not ended.wait(0.0005):
            turns.append(1)
            running.set()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    running.wait(10)
    begin = len(turns)
    planner.plan(counts_RPE, homes_RS, ExactOptions(used_slots=2, limit=1.0))
    inside = len(turns) - begin
    ended.set()
    thread.join()
    assert inside > 9, f"{inside} turns of the other thread while a plan was made"  # one at each end needs no free lock
