"""Replicas and homes planned from history by the compiled library: those of the numpy twins, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions, best_replicas, search_space
from megatron_smartmoe.placement.search.improve import improve
from megatron_smartmoe.placement.search.objective import Objective
from megatron_smartmoe.runtime.replicas.history_plan import compiled_best_replicas, compiled_improve
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from tests.unit.ops.test_placement import needs_library
from tests.unit.placement.cases import random_slots

pytestmark = needs_library


@st.composite
def layers(draw: st.DrawFn) -> tuple[IntArray, FloatArray, int, ReplicaOptions]:
    """Slots with some replicas, scenarios around one load or far apart, home slots and options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.sampled_from([1, 2, 4, 6, 8, 10, 16, 20, 24, 72]))
    home_slots, spare = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    num_experts = num_ranks * home_slots
    scenarios_KE = rng.lognormal(0, rng.uniform(0, 2), num_experts) * rng.lognormal(
        0, rng.choice([0.0, 0.05, 0.5]), (draw(st.integers(1, 9)), num_experts)
    )
    if rng.random() < 0.3:  # experts and scenarios without tokens
        scenarios_KE[rng.random(scenarios_KE.shape) < 0.5] = 0.0
    options = ReplicaOptions(
        num_nodes=draw(st.sampled_from([n for n in (1, 2, 4) if num_ranks % n == 0])),
        objective=Objective(
            replica_price=draw(st.sampled_from([0.0, 1e-3, 0.05])),
            change_price=draw(st.sampled_from([0.0, 2e-5, 0.01])),
        ),
        good_enough=draw(st.sampled_from([0.0, 0.01, 0.5])),
        effort=draw(st.sampled_from([1, 1, 3])),
    )
    return random_slots(rng, num_experts, num_ranks, spare, filled=rng.random()), scenarios_KE, home_slots, options


@given(layers())
@settings(deadline=None, max_examples=150)
def test_the_same_replicas_and_the_same_value(case: tuple[IntArray, FloatArray, int, ReplicaOptions]) -> None:
    before = case[0].copy()
    expected, found = best_replicas(*case), compiled_best_replicas(*case)
    assert np.array_equal(found.slots_RS, expected.slots_RS)
    assert found.imbalance_K.tolist() == expected.imbalance_K.tolist()
    assert (found.excess, found.steps) == (expected.excess, expected.steps)
    assert np.array_equal(case[0], before)


@given(layers(), st.sampled_from([0.0, 1e-3, 0.02]))
@settings(deadline=None, max_examples=60)
def test_the_same_homes_and_the_same_value(
    case: tuple[IntArray, FloatArray, int, ReplicaOptions], home_price: float
) -> None:
    slots_RS, scenarios_KE, home_slots, options = case
    space = replace(search_space(len(slots_RS), home_slots, options), move_homes=True, max_steps=4 * options.effort)
    objective = replace(options.objective, home_price=home_price)
    expected = improve(slots_RS, scenarios_KE, objective, space)
    found = compiled_improve(slots_RS, scenarios_KE, objective, space)
    assert np.array_equal(found.slots_RS, expected.slots_RS)
    assert found.imbalance_K.tolist() == expected.imbalance_K.tolist()
    assert (found.excess, found.steps) == (expected.excess, expected.steps)


def test_training_uses_the_compiled_ones() -> None:
    kernels = fastest_kernels()
    assert (kernels.best, kernels.improve) == (compiled_best_replicas, compiled_improve)


ARGUMENTS: dict[str, Any] = {
    "slots_RS": torch.tensor([[0, 1, -1], [2, 3, -1]]),
    "loads_KE": torch.tensor([[9, 0, 1, 0]]),
    "home_slots": 2,
    "num_nodes": 1,
    "many": False,
    "max_steps": 3,
    "max_experts": 8,
    "max_slots": 8,
    "trials": 1,
    "good_enough": 0.0,
    "worst_weight": 0.3,
    "replica_price": 0.0,
    "change_price": 0.0,
    "min_gain": 1e-4,
    "enough": 1e-4,
}
ERRORS = [
    ("slots_RS", torch.zeros(2, 3), "slots_RS.dtype = float32: it must be int64"),
    ("loads_KE", torch.zeros(1, 4), "loads_KE.dtype = float32: it must be int64"),
    ("loads_KE", torch.zeros(0, 4).long(), "loads_KE.shape = [0, 4]: it must be [K, E], none of them 0"),
    ("loads_KE", torch.tensor([[9, 0, -1, 0]]), "loads_KE[0, 2] = -1: a load is at least 0, and a row adds up to at"),
    ("loads_KE", torch.full((1, 4), 2**52), "loads_KE[0, 2] = 4503599627370496: a load is at least 0, and a row adds"),
    ("slots_RS", torch.tensor([[0, 1, -1], [2, 2, -1]]), "slots_RS[1, 1] = 2: the homes must be each of the 4 experts"),
    ("slots_RS", torch.tensor([[0, 1, -1], [2, 3, 4]]), "slots_RS[1, 2] = 4: it must be one of the 4 experts, or -1"),
    ("home_slots", 1, "home_slots = 1: it must be E / R = 4 / 2"),
    ("num_nodes", 3, "num_nodes = 3: it must divide R = 2"),
    ("trials", -1, "a limit of the search = -1: it must be at least 0"),
]


@pytest.mark.parametrize(("name", "value", "text"), ERRORS)
def test_errors(name: str, value: Any, text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.history_replicas(**{**ARGUMENTS, name: value})
    assert str(caught.value).startswith(text)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.smartmoe.history_replicas.default, tuple(ARGUMENTS.values()))
    arguments = {name: value for name, value in ARGUMENTS.items() if name not in ("many", "good_enough")}
    prices = {name: arguments.pop(name) for name in ("min_gain", "enough")}
    torch.library.opcheck(torch.ops.smartmoe.swap_homes.default, (*arguments.values(), 1e-3, *prices.values()))
