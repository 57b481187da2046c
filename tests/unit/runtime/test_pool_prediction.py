"""Predicted seconds of a pool: what each setting is good at, and agreement with the planner's prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.pool.prediction import PoolLoad, PoolPrices, moe_seconds
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.model import MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from tests.support.models import SMALL

RANKS, EXPERTS, TOKENS = 4, 16, 64_000  # tokens of a rank and micro-batch
CLUSTER = load_cluster_spec(Path(__file__).parents[3] / "configs" / "clusters" / "h100-sxm.yaml")
MODEL = replace(
    SMALL,
    layers=2,
    hidden=2048,
    query_groups=16,
    head_dim=128,
    vocab=1000,
    seq_length=4096,
    moe=MoESpec(experts=EXPERTS, top_k=2, ffn=4096),
)
SPEC = ParallelSpec(gpus=RANKS, ep=RANKS, micro_batch=1, global_batch=64)
PRICES = PoolPrices(model=MODEL, spec=SPEC, cluster=CLUSTER, num_nodes=1, micro_batches=16, layers_in_a_row=32.0)
OFF = PoolSetting(homes_interval=0, spare_slots=0, replicas="off", overlap_degree=1)
HISTORY = replace(OFF, spare_slots=1, replicas="history")
EXACT = replace(OFF, spare_slots=1, replicas="exact")
AUTO = replace(OFF, spare_slots=1, replicas="auto")


def load(*shares: IntArray) -> PoolLoad:
    """Two layers; each row of weights is an iteration, the last one the present."""
    rows = [np.rint(row / row.sum() * TOKENS).astype(np.int64) for row in shares]
    totals = np.stack([np.stack([row, row]) for row in rows]) * RANKS * PRICES.micro_batches
    batch = np.broadcast_to(rows[-1], (1, 2, RANKS, EXPERTS)).copy()
    homes = np.broadcast_to(np.arange(EXPERTS).reshape(RANKS, -1), (2, RANKS, EXPERTS // RANKS)).copy()
    return PoolLoad(totals_ILE=totals, batches_BLRE=batch, homes_LRH=homes)


def hot(*experts: int) -> IntArray:
    """Some experts get as much as all others together."""
    weights = np.ones(EXPERTS, dtype=np.int64)
    weights[list(experts)] = (EXPERTS - len(experts)) // len(experts)
    return weights


STEADY = load(hot(0), hot(0), hot(0))
JUMPED = load(hot(0), hot(0), hot(9))
EVEN = load(*[np.ones(EXPERTS, dtype=np.int64)] * 3)


def test_replicas_help_a_hot_expert_and_cost_where_all_are_even() -> None:
    steady = moe_seconds([OFF, HISTORY, EXACT], STEADY, PRICES)
    assert max(steady[HISTORY], steady[EXACT]) < 0.8 * steady[OFF]
    assert steady[HISTORY] <= steady[EXACT]  # once an iteration, not once a micro-batch; here both are hidden
    dear = replace(PRICES, replica=ReplicaOptions(price=TransferPrice.of_each(1e9)))
    even = moe_seconds([OFF, HISTORY, EXACT], EVEN, dear)
    assert even[HISTORY] == even[EXACT] == even[OFF]


def test_history_pays_for_a_load_that_jumps() -> None:
    jumped = moe_seconds([OFF, HISTORY, EXACT], JUMPED, PRICES)
    assert jumped[EXACT] < 0.8 * jumped[HISTORY]
    assert jumped[HISTORY] == pytest.approx(jumped[OFF], rel=0.05)


def test_auto_is_history_until_the_load_jumps() -> None:
    steady = moe_seconds([HISTORY, AUTO], STEADY, PRICES)
    assert steady[AUTO] == steady[HISTORY]
    jumped = moe_seconds([HISTORY, EXACT, AUTO], JUMPED, PRICES)
    assert jumped[EXACT] <= jumped[AUTO] < 0.85 * jumped[HISTORY]  # history's replicas were fetched all the same
    dear = moe_seconds([HISTORY, AUTO], JUMPED, replace(PRICES, exact_price=TransferPrice.of_each(1e9)))
    assert dear[AUTO] == dear[HISTORY]


def test_homes_that_may_move_are_priced_where_they_would_go() -> None:
    """Two hot experts at home on one rank."""
    both, moving = load(hot(0, 1), hot(0, 1), hot(0, 1)), replace(OFF, homes_interval=100)
    seconds = moe_seconds([OFF, moving], both, PRICES)
    assert seconds[moving] < 0.8 * seconds[OFF]
    stuck = moe_seconds([OFF, moving], both, replace(PRICES, homes_move=False))
    assert stuck[moving] == stuck[OFF] == seconds[OFF]


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_prices_are_the_planners(degree: int) -> None:
    """The same flow, the same function, the same number."""
    setting = replace(OFF, overlap_degree=degree)
    (found,) = moe_seconds([setting], STEADY, PRICES).values()
    flow = LayerFlow.equal_split(STEADY.batches_BLRE[0, 0], STEADY.homes_LRH[0])
    spec, constants = replace(SPEC, overlap_degree=degree), StepConstants.of(CLUSTER)
    times = moe_times([flow], layer_constants(CLUSTER, MODEL, spec, constants), MODEL, spec, CLUSTER, constants)
    assert found == pytest.approx(32.0 * times.total_s, rel=1e-12)


def test_moved_homes_are_the_ones_that_are_priced() -> None:
    """With the hot experts at home on different ranks already, moving has nothing to win."""
    both, moving = load(hot(0, 1), hot(0, 1), hot(0, 1)), replace(OFF, homes_interval=100)
    homes = both.homes_LRH.copy()
    homes[:, [0, 1], [1, 0]] = homes[:, [1, 0], [0, 1]]
    apart = moe_seconds([OFF, moving], replace(both, homes_LRH=homes), PRICES)
    assert apart[moving] == pytest.approx(apart[OFF], rel=0.01)
    assert apart[OFF] < 0.8 * moe_seconds([OFF], both, PRICES)[OFF]
