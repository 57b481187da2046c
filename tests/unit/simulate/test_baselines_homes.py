"""The peers' rules that move homes: contiguous, longest first, SmartMoE (2023), EPLB; each against a hand example."""

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerProblem
from megatron_smartmoe.simulate.baselines import by_name
from megatron_smartmoe.simulate.baselines.eplb import EplbHierarchical, pack_evenly, replicas_by_load
from megatron_smartmoe.simulate.baselines.greedy import longest_first
from megatron_smartmoe.spec.arrays import IntArray
from tests.unit.placement.cases import contiguous_slots, rank_loads


def problem(
    load_E: list[int], num_ranks: int, *, spare_slots: int = 0, num_nodes: int = 1, slots_RS: IntArray | None = None
) -> LayerProblem:
    """All tokens from source rank 0."""
    counts_RE = np.zeros((num_ranks, len(load_E)), dtype=np.int64)
    counts_RE[0] = load_E
    slots_RS = contiguous_slots(len(load_E), num_ranks, spare_slots) if slots_RS is None else slots_RS
    return LayerProblem(counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=spare_slots, num_nodes=num_nodes)


RULES = "none smartmoe2023 lpt eplb eplb-hierarchical fastermoe echo ultraep ultraep-min1 llep laer epic".split()
RULES += ["moonep", "lplb"]


def test_names_of_the_table() -> None:
    assert list(by_name()) == RULES


def test_contiguous() -> None:
    # Two ranks of three: 9 + 7 + 6 = 22 and 5 + 4 + 1 = 10, wherever the experts were before.
    moved_RS = np.array([[5, 4, 3], [2, 1, 0]])
    asked = problem([9, 7, 6, 5, 4, 1], 2, slots_RS=moved_RS)
    plan = by_name()["none"].plan(asked)
    assert plan.slots_RS.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [22, 10]


def test_longest_first_with_a_cap() -> None:
    # 9 to rank 0; 7 and 6 to rank 1 (13); 5 to rank 0 (14); 4 to rank 1 (17, full); 1 to rank 0 (15).
    asked = problem([9, 7, 6, 5, 4, 1], 2)
    for name in ("lpt", "smartmoe2023"):
        plan = by_name()[name].plan(asked)
        assert plan.slots_RS.tolist() == [[0, 3, 5], [1, 2, 4]]
        assert rank_loads(plan, asked.counts_RE).tolist() == [15, 17]


def test_the_cap_may_force_an_expert_onto_the_busier_rank() -> None:
    # 10 to rank 0; 1 and 1 to rank 1, which is full then; the last 1 has to go to rank 0.
    assert longest_first(np.array([10, 1, 1, 1]), 2).tolist() == [0, 1, 1, 0]


def test_smartmoe_prefers_the_present_rank_among_equals() -> None:
    # Expert 1 meets two empty ranks and stays on rank 1, 2 goes to rank 0, 3 meets 8 and 8 and stays on rank 1.
    present_E = np.array([0, 1, 0, 1])
    load_E = np.array([0, 8, 8, 3])
    assert longest_first(load_E, 2, prefer_rank_E=present_E).tolist() == [0, 1, 0, 1]
    assert longest_first(load_E, 2).tolist() == [1, 0, 1, 0]


def test_smartmoe_keeps_the_old_placement_without_a_strict_gain() -> None:
    # Present: 5 + 5 on both ranks. Longest first would make {0, 2} and {1, 3}, also 10: not better, nothing moves.
    asked = problem([5, 5, 5, 5], 2)
    assert by_name()["smartmoe2023"].plan(asked).slots_RS.tolist() == [[0, 1], [2, 3]]
    assert by_name()["lpt"].plan(asked).slots_RS.tolist() == [[0, 2], [1, 3]]


def test_smartmoe_leaves_spare_slots_empty() -> None:
    plan = by_name()["smartmoe2023"].plan(problem([9, 1, 1, 1], 2, spare_slots=1))
    assert plan.slots_RS[:, 2].tolist() == [-1, -1]


def test_eplb_replicas_by_load_per_replica() -> None:
    # 12 is halved to 6, still above 4, so it is cut to thirds of 4; then all are equal and the first gets the next.
    assert replicas_by_load(np.array([12, 4, 4, 4]), 2).tolist() == [3, 1, 1, 1]
    assert replicas_by_load(np.array([12, 4, 4, 4]), 3).tolist() == [4, 1, 1, 1]


def test_eplb_global() -> None:
    # Replicas 0 0 0 1 2 3 of 4 tokens each, dealt to the emptier rank, the lower of equals: {0, 0, 2} and {0, 1, 3}.
    # Two replicas of expert 0 share a rank. Loads: 4 + 4 + 4 on both.
    asked = problem([12, 4, 4, 4], 2, spare_slots=1)
    plan = by_name()["eplb"].plan(asked)
    assert plan.slots_RS.tolist() == [[0, 0, 2], [0, 1, 3]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [12, 12]


def test_eplb_hierarchical_keeps_replicas_on_their_groups_node() -> None:
    # Groups {0, 1} of 16 and {2, 3} of 4 get a node of two ranks and four slots each. Node 0: expert 0 gets both spare
    # slots (12 / 3 = 4), ranks {0, 0} and {0, 1} with 8 each. Node 1: one more of each, twice {2, 3}, 2 each.
    asked = problem([12, 4, 2, 2], 4, spare_slots=1, num_nodes=2)
    plan = EplbHierarchical(num_groups=2).plan(asked)
    assert plan.slots_RS.tolist() == [[0, 0], [0, 1], [2, 3], [2, 3]]
    assert rank_loads(plan, asked.counts_RE).tolist() == [8, 8, 2, 2]


def test_eplb_hierarchical_falls_back_to_global() -> None:
    # Three groups do not divide into two nodes. Global: expert 0 gets 3 more replicas (3 each), expert 1 one (2 each):
    # every rank gets a 3 and a 2.
    asked = problem([12, 4, 2, 2], 4, spare_slots=1, num_nodes=2)
    plan = EplbHierarchical(num_groups=3).plan(asked)
    assert rank_loads(plan, asked.counts_RE).tolist() == [5, 5, 5, 5]


def test_packs_of_one_stay_in_order() -> None:
    assert pack_evenly(np.array([1.0, 9.0, 4.0]), 3) == [[0], [1], [2]]
