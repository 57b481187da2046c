"""Replicas planned from history: good on the next record, kept while they balance, renewed after a jump."""

import numpy as np
import pytest

from megatron_smartmoe.placement.history import History, HistoryOptions
from megatron_smartmoe.placement.layer_plan import LayerPlan
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, fill_spare_slots, plan_replicas, search_space
from megatron_smartmoe.placement.search.objective import Objective
from megatron_smartmoe.placement.split import min_max_split
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of
from tests.support.synthetic import SyntheticSpec, synthetic_trace
from tests.unit.placement.cases import contiguous_slots, rank_loads


def follow(spec: SyntheticSpec, num_ranks: int, spare_slots: int) -> FloatArray:
    """Plan before each record, evaluate on it: imbalance and slots changed, without the first two records."""
    counts = synthetic_trace(spec).groups(num_ranks)[:, 0, 0, 0]
    home_slots = spec.num_experts // num_ranks
    slots_RS = contiguous_slots(spec.num_experts, num_ranks, spare_slots)
    history = History(1, spec.num_experts, HistoryOptions.for_ranks(num_ranks))
    rows = []
    for counts_RE in counts:
        if history.num_records:
            before_ER = hosts_of(slots_RS, spec.num_experts)
            slots_RS = plan_replicas(slots_RS, history.scenarios_KE(0), home_slots).slots_RS
            Placement(slots_LRS=slots_RS[None], num_experts=spec.num_experts)
            load_R = rank_loads(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE)
            changed = (hosts_of(slots_RS, spec.num_experts) & ~before_ER).sum()
            rows.append((load_R.max() / load_R.mean(), changed))
        history.update(counts_RE.sum(axis=0)[None, None])
    return np.array(rows[2:]).T


@pytest.mark.parametrize(
    ("kind", "num_ranks", "spare_slots", "limit"),
    [("lognormal", 8, 1, 1.005), ("lognormal", 16, 2, 1.005), ("drifting", 8, 1, 1.02), ("zipf", 8, 2, 1.003)],
)
def test_balance_on_the_next_record(kind: str, num_ranks: int, spare_slots: int, limit: float) -> None:
    spec = SyntheticSpec(kind=kind, num_records=12, num_layers=1, skew=1.5, seed=3)
    imbalance, _ = follow(spec, num_ranks, spare_slots)
    assert imbalance.mean() <= limit


def test_replicas_stay_while_they_balance() -> None:
    _, changed = follow(SyntheticSpec(kind="lognormal", num_records=12, num_layers=1, skew=1.3), 8, 1)
    assert changed.mean() < 0.5


def test_a_jump_of_the_load_is_met_by_a_fresh_plan() -> None:
    rng = np.random.default_rng(0)
    old_E, new_E = rng.lognormal(0, 1.2, 32), rng.lognormal(0, 1.2, 32)
    slots_RS = plan_replicas(contiguous_slots(32, 8, 1), old_E[None], 4).slots_RS
    after = plan_replicas(slots_RS, new_E[None], 4)
    assert after.imbalance_K[0] < 1.001


def test_a_replica_has_to_earn_its_traffic() -> None:
    load_E = np.random.default_rng(1).lognormal(0, 1.2, 32)[None]
    replicas = {}
    for price in (0.0, 1e-3, 0.2):
        options = ReplicaOptions(objective=Objective(replica_price=price))
        found = plan_replicas(contiguous_slots(32, 8, 2), load_E, 4, options).slots_RS
        replicas[price] = int((found[:, 4:] != EMPTY).sum())
    assert replicas[1e-3] <= replicas[0.0]
    assert replicas[0.2] < replicas[1e-3] <= 8


def test_replicas_of_several_nodes_stay_at_home() -> None:
    load_E = np.random.default_rng(2).lognormal(0, 1.2, 32)[None]
    found = plan_replicas(contiguous_slots(32, 8, 1), load_E, 4, ReplicaOptions(num_nodes=2)).slots_RS
    for rank, slot in np.argwhere(found[:, 4:] != EMPTY):
        assert found[rank, slot + 4] // 16 == rank // 4


def test_without_spare_slots_there_is_nothing_to_plan() -> None:
    slots_RS = contiguous_slots(32, 8, 0)
    assert np.array_equal(plan_replicas(slots_RS, np.arange(32.0)[None], 4).slots_RS, slots_RS)


def test_free_slots_are_filled_with_the_largest_loads_per_host_on_their_home_node() -> None:
    slots_RS = contiguous_slots(8, 4, 1)  # two experts a rank, two ranks a node
    slots_RS[1, 2] = 0
    load_E = np.array([90, 10, 40, 10, 80, 10, 10, 10])
    space = search_space(4, 2, ReplicaOptions(num_nodes=2))
    filled_RS = fill_spare_slots(slots_RS, load_E, space)
    assert filled_RS[:, 2].tolist() == [2, 0, 6, 4]  # rank 2: the largest that it may and does not hold
    anywhere = fill_spare_slots(slots_RS, load_E, search_space(4, 2, ReplicaOptions()))
    assert anywhere[3, 2] == 4
    Placement(slots_LRS=anywhere[None], num_experts=8)


def test_many_ranks_use_their_second_slot_to_be_robust() -> None:
    spec = SyntheticSpec(kind="drifting", num_records=2, num_layers=1, num_sources=32, num_experts=128, seed=1)
    before_RE, after_RE = synthetic_trace(spec).groups(32)[:, 0, 0, 0]
    history = History(1, 128, HistoryOptions.for_ranks(32))
    history.update(before_RE.sum(axis=0)[None, None])
    found = {}
    for spare in (1, 2):
        plan = plan_replicas(contiguous_slots(128, 32, spare), history.scenarios_KE(0), 4)
        tokens_ER = min_max_split(after_RE, hosts_of(plan.slots_RS, 128))
        found[spare] = tokens_ER.sum(axis=0).max() / tokens_ER.sum(axis=0).mean()
    assert found[2] <= min(1.002, found[1])
