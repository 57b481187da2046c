"""The peers' rules that replicate experts and keep homes; each against an example by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.placement.layer_plan import LayerProblem
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.baselines.echo import spillover
from megatron_smartmoe.simulate.baselines.fastermoe import FasterMoE
from megatron_smartmoe.simulate.baselines.moonep import rank_flows
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp, ultraep_relay
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.placement.cases import contiguous_slots, random_counts, rank_loads

# Three ranks of two experts: 16, 2 and 0 tokens, mean 6. Rank 0 has 10 to give, rank 1 room for 4, rank 2 for 6.
LOAD_E = np.array([8, 8, 1, 1, 0, 0])


def problem(spare_slots: int, load_E: IntArray = LOAD_E, num_ranks: int = 3) -> LayerProblem:
    counts_RE = np.zeros((num_ranks, len(load_E)), dtype=np.int64)
    counts_RE[0] = load_E
    slots_RS = contiguous_slots(len(load_E), num_ranks, spare_slots)
    return LayerProblem(counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=spare_slots)


def test_echo_spillover() -> None:
    # Rank 0 stacks 8 and 8: of the first 8 - 6 = 2 are above the mean, of the second all 8. Equal loads keep order.
    assert spillover(LOAD_E, np.array([0, 0, 1, 1, 2, 2]), 3, 6).tolist() == [2, 8, 0, 0, 0, 0]
    # The hotter expert spills: 3 lies below 4, of 7 on top of it 3 + 7 - 4 = 6 are above.
    assert spillover(np.array([7, 3]), np.array([0, 0]), 1, 4).tolist() == [6, 0]


def test_echo_one_slot() -> None:
    # Rank 2 (room 6) takes 6 of expert 1's 8; 2 are left, as many as of expert 0. Rank 1 (room 4) takes expert 0's 2.
    # 2 tokens of expert 1 find no slot although rank 1 has room: 16 - 8 = 8, 2 + 2 = 4, 6.
    asked = problem(spare_slots=1)
    plan = by_name()["echo"].plan(asked)
    assert plan.slots_RS.tolist() == [[0, 1, EMPTY], [2, 3, 0], [4, 5, 1]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [8, 4, 6]


def test_echo_two_slots() -> None:
    # In the second round rank 1 takes the last 2 of expert 1: all have 6.
    plan = by_name()["echo"].plan(problem(spare_slots=2))
    assert plan.slots_RS[1].tolist() == [2, 3, 0, 1]
    assert rank_loads(plan, problem(2).counts_RE).tolist() == [6, 6, 6]


def test_ultraep_one_slot() -> None:
    # Threshold 6: expert 0 sends 6 to rank 2 and its last 2 to rank 1; both slots are used, 2 of excess are left: no.
    # 11: yes. 8: expert 0 sends all of its 8 to rank 2: yes. 7: 7 to rank 2, 1 to rank 1, 1 left: no. So 8, 2, 8.
    asked = problem(spare_slots=1)
    plan = by_name()["ultraep-min1"].plan(asked)
    assert plan.slots_RS.tolist() == [[0, 1, EMPTY], [2, 3, EMPTY], [4, 5, 0]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [8, 2, 8]


def test_ultraep_two_slots() -> None:
    # Threshold 6 works: after expert 0's 6 and 2, expert 1 sends 2 to rank 1's second slot.
    plan = by_name()["ultraep-min1"].plan(problem(spare_slots=2))
    assert plan.quota_ER is not None
    assert plan.quota_ER[:2].tolist() == [[0, 2, 6], [6, 2, 0]]
    assert rank_loads(plan, problem(2).counts_RE).tolist() == [6, 6, 6]


def test_ultraep_ignores_replicas_that_are_too_small() -> None:
    # Rank 0 has one token more than the mean; a replica must take two: nothing is copied.
    asked = problem(1, load_E=np.array([4, 2]), num_ranks=2)
    plan = UltraEp(min_tokens_per_replica=2).plan(asked)
    assert rank_loads(plan, asked.counts_RE).tolist() == [4, 2]


def test_moonep() -> None:
    # Rank 0 fills rank 2 (6), then rank 1 (4). The flow of 6 takes from expert 0 (equal, first), which leaves 2; the
    # flow of 4 from expert 1, which has 8.
    assert rank_flows(np.array([16, 2, 0])).tolist() == [[0, 4, 6], [0, 0, 0], [0, 0, 0]]
    asked = problem(spare_slots=1)
    plan = by_name()["moonep"].plan(asked)
    assert plan.slots_RS.tolist() == [[0, 1, EMPTY], [2, 3, 1], [4, 5, 0]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [6, 6, 6]


def test_moonep_remainder_goes_to_the_first_ranks() -> None:
    # 7 tokens on 3 ranks: 3, 2, 2.
    asked = problem(1, np.array([7, 0, 0]))
    assert rank_loads(by_name()["moonep"].plan(asked), asked.counts_RE).tolist() == pytest.approx([3, 2, 2])


def test_moonep_needs_at_most_two_incoming_experts_at_scale() -> None:
    rng = np.random.default_rng(0)
    counts_RE = random_counts(rng, 64, 256, sigma=1.0, tokens=8192)
    asked = LayerProblem(counts_RE=counts_RE, slots_RS=contiguous_slots(256, 64, 2), spare_slots=2)
    plan = by_name()["moonep"].plan(asked)
    assert plan.slots_RS.shape[1] <= 4 + 2
    load_R = rank_loads(plan, counts_RE)
    assert load_R.max() / load_R.mean() == pytest.approx(1.0, abs=1e-9)


# A token's transfer, its forward GEMM and an expert's weights take 1, 1 and 2 x weight_transfers seconds.
ONE_SECOND: dict[str, Any] = {"hidden": 1, "ffn_factor": 1.0, "network_bytes_s": 2.0, "gpu_flops": 4.0}


def shadowing_problem() -> LayerProblem:
    counts_RE = np.array([[10, 2], [10, 2]])
    return LayerProblem(counts_RE=counts_RE, slots_RS=contiguous_slots(2, 2, 0), spare_slots=0)


def test_fastermoe_shadows_when_it_pays() -> None:
    # Nothing shadowed: expert 0 has 20 tokens, 10 of them from afar: 3 x 20 + 4 x 10 = 100 s. Expert 0 shadowed: expert
    # 1's rank has 4 tokens, 2 from afar, and 10 of the shadow: 3 x (4 + 10) + 4 x 2 + 4 = 54 s. So shadow it. Rank 0
    # keeps its 10 of expert 0; rank 1 its 10 and all 4 of expert 1.
    rule = FasterMoE(**ONE_SECOND, weight_transfers=2.0)
    assert (rule.transfer_s, rule.compute_s, rule.shadow_s) == (1.0, 1.0, 4.0)
    plan = rule.plan(shadowing_problem())
    assert plan.slots_RS.tolist() == [[0, EMPTY], [1, 0]]
    assert rank_loads(plan, shadowing_problem().counts_RE).tolist() == [10, 14]


def test_fastermoe_does_not_shadow_when_weights_are_dear() -> None:
    # Weights of 60 s: 3 x 14 + 8 + 60 = 110 s, more than 100 s.
    plan = FasterMoE(**ONE_SECOND, weight_transfers=30.0).plan(shadowing_problem())
    assert plan.slots_RS.tolist() == [[0], [1]]
    assert rank_loads(plan, shadowing_problem().counts_RE).tolist() == [20, 4]


def test_ultraep_gives_no_quota_below_its_minimum_by_default() -> None:
    # In thousands of tokens: rank 0 has 10 to give, and all of its quotas are above 1,024. In single tokens none is.
    assert by_name()["ultraep"].plan(problem(1, LOAD_E * 1000)).slots_RS[:, 2:].tolist() != [[EMPTY]] * 3
    assert by_name()["ultraep"].plan(problem(1)).slots_RS[:, 2:].tolist() == [[EMPTY]] * 3


def test_ultraep_stays_in_the_nvlink_domain() -> None:
    # Two nodes of two ranks: 12 and 0, 4 and 0 tokens. Each node is evened out on its own: 6, 6, 2, 2.
    asked = problem(1, np.array([12, 0, 4, 0]), num_ranks=4)
    plan = UltraEp(min_tokens_per_replica=1).plan(replace(asked, num_nodes=2))
    assert rank_loads(plan, asked.counts_RE).tolist() == [6, 6, 2, 2]
    assert rank_loads(UltraEp(min_tokens_per_replica=1).plan(asked), asked.counts_RE).tolist() == [4, 4, 4, 4]


def test_ultraep_relays_a_hot_expert() -> None:
    # Expert 0, at home on rank 0, has replicas on ranks 1 to 9. Three relays (the root of 9) take it from rank 0, and
    # each sends it to two of the six others. Expert 1's three replicas are too few for relays.
    hosts_ER = np.zeros((2, 16), dtype=np.bool_)
    hosts_ER[0, :10], hosts_ER[1, 12:] = True, True
    sends_RR, returned_RR = ultraep_relay(np.array([0, 15]), hosts_ER)
    assert returned_RR.sum(axis=1).tolist() == [9, *[0] * 14, 3]  # gradients come back without relays
    assert sends_RR.sum(axis=1).tolist() == [3, 2, 2, 2, *[0] * 11, 3]
    assert sends_RR.sum(axis=0).tolist() == [0, *[1] * 9, 0, 0, 1, 1, 1, 0]
    # Relays are the replicas on ranks that have sent the least: not rank 0, which has sent its own expert twice.
    busy_ER = np.vstack([hosts_ER[0], np.isin(np.arange(16), (0, 14, 15))])
    assert ultraep_relay(np.array([2, 0]), busy_ER)[0][2].nonzero()[0].tolist() == [1, 3, 4]


def test_ultraep_sends_directly_inside_eight_ranks() -> None:
    hosts_ER = np.ones((1, 8), dtype=np.bool_)
    assert ultraep_relay(np.array([3]), hosts_ER)[0].sum(axis=1).tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
