"""What a layer's time depends on: the same counted by expert, added up at once, and by the compiled op."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.cost.moe_layer import LayerCounts, RelayedFlow
from megatron_smartmoe.placement.layer_cost import Kept, relayed_flow
from megatron_smartmoe.placement.layer_plan import LayerPlan, evaluate
from megatron_smartmoe.placement.relayed_layer import relayed_layer
from megatron_smartmoe.runtime.replicas.kernels import COMPILED
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY
from tests.unit.placement.test_relay import slot_tables

LEVELS = (2,)
Case = tuple[IntArray, IntArray, IntArray, int, int]  # counts_RE, slots_RS, kept_RS, home_slots, num_nodes


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A slot table, counts some of which are 0, and the same homes with fewer replicas."""
    slots_RS, home_slots, num_nodes = draw(slot_tables())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_experts = len(slots_RS), len(slots_RS) * home_slots
    counts_RE = rng.poisson(rng.lognormal(1, 2, num_experts), (num_ranks, num_experts)) * rng.integers(
        0, 2, num_experts
    )
    kept_RS = slots_RS.copy()
    kept_RS[rng.random(slots_RS.shape) < 0.5] = EMPTY
    kept_RS[:, :home_slots] = slots_RS[:, :home_slots]
    return counts_RE, slots_RS, kept_RS, home_slots, num_nodes


def numbers(flow: RelayedFlow) -> list[object]:
    return [each.tolist() if isinstance(each, np.ndarray) else each for each in vars(flow).values()]


@settings(max_examples=40, deadline=None)
@given(cases())
def test_it_counts_as_the_flow_by_expert_does(case: Case) -> None:
    counts_RE, slots_RS, kept_RS, home_slots, num_nodes = case
    at_once = LayerCounts.of(relayed_layer(counts_RE, slots_RS, home_slots, num_nodes, kept_RS), LEVELS)
    outcome = evaluate(LayerPlan(slots_RS=slots_RS, split="exact"), counts_RE, num_nodes)
    kept = Kept(slots_RS=kept_RS)
    by_expert = relayed_flow(slots_RS, outcome.load_ER, outcome.traffic_RR, num_nodes, kept=kept)
    counted = LayerCounts.of(by_expert, LEVELS)
    for name in ("source_tokens", "tokens", "fetched", "returned", "early_tokens", "kept", "leaving"):
        assert getattr(at_once, name) == getattr(counted, name), name
    assert np.array_equal(at_once.tokens_R, counted.tokens_R)
    assert np.array_equal(at_once.active_R, counted.active_R)


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_op_counts_the_same(case: Case) -> None:
    counts_RE, slots_RS, kept_RS, home_slots, num_nodes = case
    for kept in (None, kept_RS):
        arguments = counts_RE, slots_RS, home_slots, num_nodes, kept
        assert numbers(COMPILED.flow(*arguments)) == numbers(relayed_layer(*arguments))


@pytest.mark.skipif(not ops.is_compiled(), reason="the library is not built")
def test_the_op_refuses_what_is_no_placement() -> None:
    counts_RE, slots_RS = np.ones((2, 4), dtype=np.int64), np.array([[0, 1, EMPTY], [2, 2, EMPTY]])
    with pytest.raises(RuntimeError, match="slots_RS"):
        COMPILED.flow(counts_RE, slots_RS, 2, 1, None)
    with pytest.raises(RuntimeError, match="counts_RE"):
        COMPILED.flow(-counts_RE, np.array([[0, 1, EMPTY], [2, 3, EMPTY]]), 2, 1, None)
