"""LLEP, LAER, EPIC and LPLB, each against an example by hand."""

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerProblem
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.baselines.epic import Epic
from megatron_smartmoe.simulate.baselines.laer import Laer, laer_traffic, replicas_by_load
from megatron_smartmoe.simulate.baselines.llep import Llep
from megatron_smartmoe.simulate.baselines.lplb import Lplb, topology
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.placement.cases import contiguous_slots, rank_loads


def problem(load: list[int], num_ranks: int, spare_slots: int = 0, **changes: object) -> LayerProblem:
    counts_RE = np.zeros((num_ranks, len(load)), dtype=np.int64)
    counts_RE[0] = load
    given = {"counts_RE": counts_RE, "slots_RS": contiguous_slots(len(load), num_ranks, spare_slots)}
    return LayerProblem(**{**given, "spare_slots": spare_slots, **changes})  # type: ignore[arg-type]


# Three ranks of one expert: 16, 2 and 0 tokens, mean 6.
LLEP = Llep(capacity_factor=1.0, min_tokens=1)


def test_llep_spills_to_the_least_loaded() -> None:
    # Expert 0 has room for 6 at home and spills 10: 6 to rank 2, 4 to rank 1, which keeps room for its own 2.
    plan = LLEP.plan(problem([16, 2, 0], 3))
    assert plan.quota_ER is not None
    assert plan.quota_ER.tolist() == [[6, 4, 6], [0, 2, 0], [0, 0, 0]]
    assert plan.slots_RS.tolist() == [[0, EMPTY], [1, 0], [2, 0]]


def test_llep_forces_what_fits_nowhere_on_the_least_loaded() -> None:
    # With pieces of 5 at least, rank 1's room for 4 is not used: rank 2 takes 6, and the other 4 go over its capacity,
    # because rank 1 with its own 2 tokens is the least loaded by then: 6, 2 + 4, 6.
    plan = Llep(capacity_factor=1.0, min_tokens=5).plan(problem([16, 2, 0], 3))
    assert rank_loads(plan, problem([16, 2, 0], 3).counts_RE).tolist() == [6, 6, 6]
    # With pieces of 7 no rank takes any while more than its room is left: all 10 go to rank 2.
    plan = Llep(capacity_factor=1.0, min_tokens=7).plan(problem([16, 2, 0], 3))
    assert rank_loads(plan, problem([16, 2, 0], 3).counts_RE).tolist() == [6, 2, 10]


def test_llep_goes_through_the_ranks_once_when_all_of_an_expert_spills() -> None:
    # Ranks of two: 9 + 7, 2 + 0, 0 + 0; mean 6. Expert 0 first: its home expects 7 more, so no room is left for it, and
    # all 9 spill: 6 to rank 2, 3 to rank 1. Then 6 of expert 1 stay, and its last token goes to rank 1.
    plan = LLEP.plan(problem([9, 7, 2, 0, 0, 0], 3))
    assert plan.quota_ER is not None
    assert plan.quota_ER[:3].tolist() == [[0, 3, 6], [6, 1, 0], [0, 2, 0]]


def test_llep_does_nothing_below_its_gate() -> None:
    assert by_name()["llep"].plan(problem([1250, 1000, 750], 3)).slots_RS.tolist() == [[0], [1], [2]]


def test_laer_gives_replicas_by_load() -> None:
    # Six slots for three experts: 12, 5, 1. 12 | 5 | 1, then 6 6 | 5, then 4 4 4 (three ranks hold it), then 2.5 2.5.
    assert replicas_by_load(np.array([12, 5, 1]), 6, 1, 3).tolist() == [3, 2, 1]
    # On two nodes every expert starts with one per node where six slots suffice.
    assert replicas_by_load(np.array([12, 5, 1]), 6, 2, 4).tolist() == [2, 2, 2]
    # Five slots do not: one each, then the hottest gets one per node, and three more steps of two do not fit.
    assert replicas_by_load(np.array([12, 5, 1]), 5, 2, 4).tolist() == [2, 2, 1]


def test_laer_takes_the_cheapest_layout() -> None:
    # Two ranks of two slots, experts 10, 8: the even layout has each expert on both, the one by load too.
    plan = Laer(perturbations=0).plan(problem([10, 8], 2, spare_slots=1))
    assert plan.slots_RS.tolist() == [[0, 1], [0, 1]]
    # Without spare slots: 9 and 1 on the one rank, 6 and 2 on the other would be 10 | 8; by falling load it is 9 | 6,
    # then 2 to the lighter one, 8, and 1 to the last free slot.
    plan = Laer(perturbations=0).plan(problem([9, 1, 6, 2], 2))
    assert sorted(map(sorted, plan.slots_RS.tolist())) == [[0, 1], [2, 3]]


def test_laer_gathers_every_expert_from_all_ranks() -> None:
    # Rank 0 computes two experts, rank 1 one: half of each comes from the other rank.
    fetch_RR, returned_RR = laer_traffic(np.array([0, 1]), np.array([[True, True], [True, False]]))
    assert fetch_RR.tolist() == [[0, 0.5], [1.0, 0]]
    assert returned_RR.tolist() == [[0, 1.0], [0.5, 0]]


def test_epic_starts_with_instances_by_load() -> None:
    # Three ranks of one expert and a spare slot: 12, 4, 2. Expert 0 gets two more (12, 6, 4), then experts 0 and 1 are
    # equal and the lower one is full: expert 1 gets one. Instances 4 4 4 | 2 2 | 2: 4 on each rank, then 2 on each.
    plan = by_name()["epic"].plan(problem([12, 4, 2], 3, spare_slots=1))
    assert rank_loads(plan, problem([12, 4, 2], 3).counts_RE).tolist() == [6, 6, 6]
    assert plan.slots_RS[:, 0].tolist() == [0, 0, 0]


def test_epic_swaps_once_per_pair() -> None:
    # 9 + 7, 1 + 2, 5 + 4, 3 + 3. The heaviest (16) and the lightest (3): 9 for 2 leaves 9 | 10, 7 for 1 leaves 10 | 9,
    # 9 for 1 leaves 8 | 11, 7 for 2 leaves 11 | 8: the first of the two tens. 9 and 6: a 5 for a 3 leaves 7 | 8.
    asked = problem([9, 7, 1, 2, 5, 4, 3, 3], 4)
    plan = Epic().plan(asked)
    assert plan.slots_RS.tolist() == [[3, 1], [2, 0], [6, 5], [4, 7]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [9, 10, 7, 8]


def test_epic_swaps_only_for_a_gain_and_never_doubles_an_expert() -> None:
    asked = problem([9, 7, 1, 2, 5, 4, 3, 3], 4)
    assert np.array_equal(Epic(min_gain_tokens=7.0).plan(asked).slots_RS, asked.slots_RS)
    # 7 | 4, both with half of expert 0: the one swap that no double forbids, 4 for 1, only turns the pair around.
    full = problem([6, 4, 1, 0], 2, spare_slots=1, slots_RS=np.array([[0, 1, 3], [2, 0, 3]]))
    assert Epic().plan(full).slots_RS.tolist() == full.slots_RS.tolist()


def test_epic_swaps_inside_nodes() -> None:
    asked = problem([9, 7, 1, 2], 4, num_nodes=2)
    assert Epic().plan(asked).slots_RS.ravel().tolist() == [0, 1, 2, 3]


def test_lplb_has_one_replica_of_each_rank_on_its_neighbour() -> None:
    # Three ranks of two experts in a ring: 9 + 3, 1 + 1, 2 + 2. Expert 0 goes to rank 1, expert 2 (the first of two
    # equal ones) to rank 2, expert 4 to rank 0. Moving a of 9 along the first edge: 12 - a, 2 + a - b, 4 + b, with b at
    # most 1: the best is 7, 6, 5 (a 5, b 1).
    plan = Lplb().plan(problem([9, 3, 1, 1, 2, 2], 3, spare_slots=1))
    assert plan.slots_RS.tolist() == [[0, 1, 4], [2, 3, 0], [4, 5, 2]]
    assert sorted(rank_loads(plan, problem([9, 3, 1, 1, 2, 2], 3).counts_RE).tolist()) == [5, 6, 7]


def test_lplb_columns_are_permutations() -> None:
    for num_ranks in (1, 2, 3, 4, 6, 8, 16, 64):
        for column_R in topology(num_ranks):
            assert sorted(column_R.tolist()) == list(range(num_ranks))
            assert num_ranks == 1 or (column_R != np.arange(num_ranks)).all()
    assert topology(8).tolist() == [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
