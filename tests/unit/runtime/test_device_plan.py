"""A plan made where the counts are must equal the host's steps on the same slots, to the last token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.runtime.replicas.device_plan import DevicePlanner
from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions, RankView, plan_in_steps
from megatron_smartmoe.runtime.replicas.split import homes_only, slot_of_device_rows, slot_of_rows
from megatron_smartmoe.spec.placement import with_empty_slots
from tests.unit.ops.test_placement import needs_library, random_load
from tests.unit.runtime.test_dispatch_plan import content

pytestmark = needs_library


def view_of(num_ranks: int, home_slots: int, spare: int, rank: int) -> RankView:
    sizes = {"num_ranks": num_ranks, "num_experts": num_ranks * home_slots, "num_slots": home_slots + spare}
    return RankView(**sizes, tp_size=1, num_nodes=1, rank=rank, tp_rank=0)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_ranks=st.integers(1, 12),
    home_slots=st.integers(1, 4),
    spare=st.integers(0, 3),
    limit=st.sampled_from([1.0, 1.01, 1.5, 4.0]),
)
@settings(deadline=None, max_examples=80)
def test_the_plan_is_that_of_the_host(seed: int, num_ranks: int, home_slots: int, spare: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    view = view_of(num_ranks, home_slots, spare, int(rng.integers(num_ranks)))
    counts_RE = random_load(rng, num_ranks, view.num_experts).astype(np.int64)
    counts_RE[rng.random(num_ranks) < 0.2] = 0
    exact = ExactOptions(used_slots=int(rng.integers(spare + 1)), limit=limit)
    # Step 1: the replicas of the greedy pass, or none where homes are balanced
    homes_RS = homes_only(view.num_experts, num_ranks, exact.used_slots)
    load_E = counts_RE.sum(axis=0)
    slots_RS = exact_replicas(load_E, homes_RS, home_slots, trials=0)
    if load_E.reshape(num_ranks, -1).sum(axis=1).max() * num_ranks <= limit * load_E.sum():
        slots_RS = homes_RS
    # Step 2: all that follows, for two micro-batches, since the memory is used again
    planner, counts = DevicePlanner(view, pinned=False), torch.from_numpy(counts_RE)
    first = content(planner.plan(counts, exact))
    planner.plan(counts.flip(1), exact)
    expected = plan_in_steps(view, counts[:, None], with_empty_slots(slots_RS, spare - exact.used_slots))
    assert first == content(expected)


@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 6), spare=st.integers(0, 2), tokens=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_slots_of_choices_before_the_host_has_read_the_plan(seed: int, num_ranks: int, spare: int, tokens: int) -> None:
    """Some choices are dropped, as a capacity drops them: no shape depends on how many."""
    rng = np.random.default_rng(seed)
    view = view_of(num_ranks, 3, spare, int(rng.integers(num_ranks)))
    ids_TK = torch.from_numpy(rng.integers(-1, view.num_experts, (tokens, 2)).astype(np.int32))
    rows_TK, tokens_E = ops.dispatch_map(ids_TK, torch.arange(view.num_experts), view.num_experts)
    counts = torch.from_numpy(random_load(rng, num_ranks, view.num_experts).astype(np.int64))
    counts[view.rank] = tokens_E
    planner = DevicePlanner(view, pinned=False)
    numbers, segments_3C = planner.start(counts, ExactOptions(used_slots=spare, limit=1.0))
    found = slot_of_device_rows(rows_TK, segments_3C, num_ranks * view.num_slots)
    plan = planner.read(numbers, segments_3C)
    assert torch.equal(found, slot_of_rows(rows_TK, plan.segments_2N, plan.slots_RS, plan.num_rows))


def test_what_it_cannot_plan_is_refused() -> None:
    with pytest.raises(AssertionError, match="for one node"):
        DevicePlanner(RankView(**{**vars(view_of(4, 1, 1, 0)), "num_nodes": 2}), pinned=False)
