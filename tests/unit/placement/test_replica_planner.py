"""Replicas follow homes that move, and are not made where they cost more than they save."""

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, plan_replicas, replicas_pay
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement

HOT = np.array([[40.0, 4, 4, 4, 4, 4, 2, 2]])  # of 64 tokens on 4 ranks: the first rank has 44, the mean is 16


def homes(num_ranks: int = 4, spare_slots: int = 1) -> Placement:
    return Placement.contiguous(num_layers=1, num_experts=8, num_ranks=num_ranks, spare_slots=spare_slots)


def planner(price_tokens: float = 0.0, num_nodes: int = 1) -> ReplicaPlanner:
    replica = ReplicaOptions(num_nodes=num_nodes, price=TransferPrice.of_each(price_tokens))
    return ReplicaPlanner(homes(), 0, OnlineOptions(replica=replica))


def replicas(slots_RS: IntArray) -> int:
    return int((slots_RS[:, 2:] != EMPTY).sum())


def test_a_layer_makes_replicas_only_where_they_pay() -> None:
    slots_RS = homes().slots_LRS[0]
    free = plan_replicas(slots_RS, HOT, 2)
    assert replicas(free.slots_RS) >= 2
    dear = plan_replicas(slots_RS, HOT, 2, ReplicaOptions(price=TransferPrice.of_each(100.0)), rank_tokens=16.0)
    assert replicas(dear.slots_RS) == 0
    assert dear.imbalance_K[0] == 44 / 16
    cheap = plan_replicas(slots_RS, HOT, 2, ReplicaOptions(price=TransferPrice.of_each(1.0)), rank_tokens=16.0)
    assert 0 < replicas(cheap.slots_RS) <= replicas(free.slots_RS)


def test_the_price_counts_transfers_that_follow_one_another() -> None:
    slots_RS = homes().slots_LRS[0].copy()
    slots_RS[1:, 2] = 0  # three replicas of one expert: two rounds
    assert replicas_pay(slots_RS, 2, saved_tokens=21.0, price=TransferPrice.of_each(10.0))
    assert not replicas_pay(slots_RS, 2, saved_tokens=20.0, price=TransferPrice.of_each(10.0))


def test_more_tokens_an_iteration_make_the_same_replicas_pay() -> None:
    small, large = planner(price_tokens=100.0), planner(price_tokens=100.0)
    small.observe(HOT.astype(np.int64)[:, None])
    large.observe(HOT.astype(np.int64)[:, None].repeat(100, axis=1))  # 100 micro-batches
    assert small.plan(1) is None
    decision = large.plan(1)
    assert decision is not None
    assert decision.kind == "replicas"
    assert replicas(large.placement.slots_LRS[0]) > 0


def test_replicas_stay_when_homes_move_unless_they_may_not() -> None:
    tried = planner(num_nodes=2)
    slots_LRS = tried.placement.slots_LRS.copy()
    slots_LRS[0, 1, 2], slots_LRS[0, 3, 2] = 0, 4  # replicas of experts 0 and 4 beside their homes on ranks 0 and 2
    tried.placement = Placement(slots_LRS=slots_LRS, num_experts=8)
    moved = homes().slots_LRS.copy()
    moved[0, 0, 0], moved[0, 3, 0] = 6, 0  # experts 0 and 6 change places: 0 goes to another node than its replica
    tried.rehome(Placement(slots_LRS=moved, num_experts=8))
    assert tried.placement.slots_LRS[0].tolist() == [[6, 1, -1], [2, 3, -1], [4, 5, -1], [0, 7, 4]]
