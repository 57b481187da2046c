"""Where transfers are dear, homes are swapped until fewer of them have to follow one another."""

import numpy as np

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions, cheapest_exact_plan
from megatron_smartmoe.placement.fewer_transfers import homes_for_fewer_transfers
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.kernels import NUMPY
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.relay import relay_tree
from megatron_smartmoe.placement.split import busiest_rank_tokens
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement, hosts_of
from tests.unit.placement.cases import contiguous_slots

# 4 ranks with 2 experts each, a mean of 100: rank 0 has to send both of its experts, over one port.
LOAD_E = np.array([130, 130, 20, 20, 25, 25, 25, 25])
BARE_RS = contiguous_slots(8, 4, 1)


def planned(slots_RS: IntArray, price: TransferPrice) -> tuple[IntArray, int, int]:
    """Slots with replicas, tokens of the busiest rank, transfers in a row."""
    found_RS = cheapest_exact_plan(LOAD_E, slots_RS, 2, ExactPlanOptions(price=price, limit=1.0)).slots_RS
    return found_RS, busiest_rank_tokens(hosts_of(found_RS, 8), LOAD_E), relay_tree(found_RS, 2).steps_by_link(1)[0]


def test_hot_experts_of_one_rank_get_ports_of_their_own() -> None:
    price = TransferPrice.of_each(40.0)
    slots_RS, busiest, in_a_row = planned(BARE_RS, price)
    found_RS = homes_for_fewer_transfers(slots_RS, LOAD_E, 2, ReplicaOptions(price=price), NUMPY)
    assert found_RS is not None
    after, after_in_a_row = busiest_rank_tokens(hosts_of(found_RS, 8), LOAD_E), relay_tree(found_RS, 2).num_rounds
    assert after + 40 * after_in_a_row < busiest + 40 * in_a_row - 1
    assert after_in_a_row == 1
    assert sorted(found_RS[:, :2].ravel().tolist()) == list(range(8))
    rank_of = {expert: rank for rank, row in enumerate(found_RS[:, :2].tolist()) for expert in row}
    assert rank_of[0] != rank_of[1]


def test_homes_stay_where_transfers_cost_nothing_or_nodes_would_be_left() -> None:
    for options in (
        ReplicaOptions(price=TransferPrice.of_each(0.4)),  # below a hundredth of the mean
        ReplicaOptions(price=TransferPrice.of_each(40.0), num_nodes=4),  # a rank a node: nowhere to swap to
    ):
        exact = ExactPlanOptions(num_nodes=options.num_nodes, price=options.price, limit=1.0)
        slots_RS = cheapest_exact_plan(LOAD_E, BARE_RS, 2, exact).slots_RS
        assert homes_for_fewer_transfers(slots_RS, LOAD_E, 2, options, NUMPY) is None


def test_the_homes_loop_proposes_them() -> None:
    price = TransferPrice.of_each(40.0)
    options = OnlineOptions(homes_interval=1, replica=ReplicaOptions(price=price), state_bytes=1)
    start = Placement.contiguous(num_layers=1, num_experts=8, num_ranks=4, spare_slots=1)

    def seconds(slots_RS: IntArray, counts_RE: IntArray) -> float:
        load_E = counts_RE.sum(axis=0)
        return busiest_rank_tokens(hosts_of(slots_RS, 8), load_E) + relay_tree(slots_RS, 2).price_tokens(price)

    planner = HomesPlanner(1, 8, options, seconds)
    counts_RE = np.zeros((4, 8), dtype=np.int64)
    counts_RE[0] = LOAD_E
    for _ in range(2):
        planner.observe(counts_RE[None])
    found = planner.propose(2, start)
    assert found is not None
    proposal, decision = found
    assert decision.taken
    assert proposal.home_rank_LE[0, 0] != proposal.home_rank_LE[0, 1]
    assert decision.predicted_gain_s is not None
    assert decision.predicted_gain_s > 10
