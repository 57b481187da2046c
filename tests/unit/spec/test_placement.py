"""Placement: its rules name the entry that breaks them; digest, diff and JSON."""

import re
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, hosts_of


def two_by_two(**changes: int) -> Placement:
    """Two ranks, four experts, one spare slot each; `changes` maps (rank, slot) texts like r0s2 to experts."""
    slots_RS = np.array([[0, 1, EMPTY], [2, 3, 0]])
    for where, expert in changes.items():
        slots_RS[int(where[1]), int(where[3])] = expert
    return Placement(slots_LRS=slots_RS[None], num_experts=4)


def test_contiguous_is_megatrons_order() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=4, spare_slots=1)
    assert placement.slots_LRS[1].tolist() == [[0, 1, -1], [2, 3, -1], [4, 5, -1], [6, 7, -1]]
    assert placement.home_rank_LE[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (placement.home_slots, placement.spare_slots) == (2, 1)


def test_homes_and_hosts() -> None:
    placement = two_by_two(r0s0=3, r1s1=0, r1s2=1)
    assert placement.home_rank_LE[0].tolist() == [1, 0, 1, 0]
    assert placement.hosts_LER[0].tolist() == [[False, True], [True, True], [False, True], [True, False]]
    assert hosts_of(placement.slots_LRS[0], 4).tolist() == placement.hosts_LER[0].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r0s0": 4}, "layer 0, rank 0, slot 0 = 4: must be -1 or an expert below 4"),
        ({"r1s2": -2}, "layer 0, rank 1, slot 2 = -2: must be -1 or an expert below 4"),
        ({"r0s1": -1}, "layer 0, rank 0, slot 1 is a home slot and must not be empty"),
        ({"r0s1": 2}, "layer 0, expert 2 has 2 homes (rank 0 slot 1, rank 1 slot 0), it must have one"),
        ({"r1s2": 3}, "layer 0, rank 1 holds expert 3 twice: a rank needs it once"),
    ],
)
def test_a_wrong_entry_is_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        two_by_two(**changes)


@pytest.mark.parametrize(
    ("slots", "num_experts", "message"),
    [
        (np.zeros((2, 3), int), 4, "slots must be [layers, ranks, slots]"),
        (np.zeros((1, 3, 2), int), 4, "4 experts cannot be shared evenly by 3 ranks"),
        (np.zeros((1, 2, 1), int), 4, "slots per rank = 1: must be at least the homes per rank, 2"),
    ],
)
def test_a_wrong_shape_is_named(slots: IntArray, num_experts: int, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Placement(slots_LRS=slots, num_experts=num_experts)


def test_contiguous_refuses_uneven_homes() -> None:
    with pytest.raises(PlanError, match="6 experts cannot be shared evenly by 4 ranks"):
        Placement.contiguous(num_layers=1, num_experts=6, num_ranks=4)


def test_diff_lists_changed_slots_in_order() -> None:
    before, after = two_by_two(), two_by_two(r0s0=3, r1s1=0, r1s2=EMPTY)
    changes = [(c.rank, c.slot, c.before, c.after) for c in before.diff(after)]
    assert changes == [(0, 0, 0, 3), (1, 1, 3, 0), (1, 2, 0, EMPTY)]
    assert before.diff(before) == ()
    with pytest.raises(PlanError, match="different shape"):
        before.diff(Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2))


def test_digest_tells_placements_apart_and_equality_follows() -> None:
    assert two_by_two() == two_by_two()
    assert hash(two_by_two()) == hash(two_by_two())
    assert two_by_two().digest != two_by_two(r1s2=1).digest
    assert two_by_two() != two_by_two(r1s2=1)
    assert two_by_two() != "a placement"


def test_the_digest_of_a_placement_never_changes() -> None:
    """Checkpoints carry it, and ranks on other machines compare it."""
    placement = Placement.contiguous(num_layers=3, num_experts=8, num_ranks=2, spare_slots=1)
    assert placement.digest == "b9ab18740b0e26d6"


def test_json_round_trip_and_its_refusals() -> None:
    content = two_by_two().to_json()
    assert Placement.from_json(content) == two_by_two()
    with pytest.raises(PlanError, match="only version 1 is known"):
        Placement.from_json({**content, "version": 2})
    with pytest.raises(PlanError, match=r"placement digest = 'x'"):
        Placement.from_json({**content, "digest": "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": True}, "placement version = True: only version 1 is known"),
        ({"experts": "4"}, "placement.experts = '4': must be a whole number"),
        ({"experts": 10**12}, "slots per rank = "),
        ({"slots": [[[0, 1.5], [2, 3]]]}, "placement.slots[0][0][1] = 1.5: must be a whole number"),
        ({"slots": [[[0, 1], [2]]]}, "placement.slots[0][1] = [2]: must have 2 entries"),
        ({"slots": "x"}, "placement.slots = 'x': must be a list"),
        ({"slots": []}, "none of them zero"),
        ({"slots": [[[10**30]]]}, "must be a whole number"),
    ],
)
def test_a_damaged_placement_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Placement.from_json({**two_by_two().to_json(), **changes})


@pytest.mark.parametrize("content", [None, [], "x", 3])
def test_what_is_no_placement_is_refused(content: Any) -> None:
    with pytest.raises(PlanError, match="must be a mapping"):
        Placement.from_json(content)


def test_the_callers_array_is_neither_kept_nor_writable() -> None:
    slots = np.array([[[0], [1]]])
    placement = Placement(slots_LRS=slots, num_experts=2)
    slots[0, 0, 0] = 1
    assert placement.slots_LRS[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.slots_LRS[0, 0, 0] = 1
