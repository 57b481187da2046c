"""The limit: no plan beats it, found by trying all of them, and it is reached."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerCounts
from megatron_smartmoe.cost.replicas import EVERY_MICRO_BATCH, ReplicaSchedule
from megatron_smartmoe.placement.layer_cost import LayerPricing, PricedLayer, even_load
from megatron_smartmoe.simulate.limit import limit_s
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY

HISTORY = ReplicaSchedule(micro_batches=4, weight_share=1 / 3, fetch_hidden="forward", return_hidden="backward")
EXACT = ReplicaSchedule(fetch_hidden="home_rows", return_hidden="backward")
SLOW = LayerConstants(fixed_s=1.0, source_token_s=0.1, token_s=1.0, intra_replica_s=30.0, inter_replica_s=90.0)


def all_plans(num_ranks: int, home_slots: int) -> Iterator[IntArray]:
    """Every slot table with one spare slot per rank."""
    experts = range(num_ranks * home_slots)
    homes = {
        tuple(frozenset(order[rank * home_slots :][:home_slots]) for rank in range(num_ranks))
        for order in itertools.permutations(experts)
    }
    if home_slots == 1:
        homes = {tuple(frozenset({expert}) for expert in experts)}  # other orders only number the ranks anew
    for each in homes:
        others = [[EMPTY, *(expert for expert in experts if expert not in own)] for own in each]
        for spare in itertools.product(*others):
            yield np.array([[*sorted(own), one] for own, one in zip(each, spare, strict=True)])


@pytest.mark.parametrize(
    ("num_ranks", "home_slots", "num_nodes", "schedule"),
    [
        (4, 1, 1, EVERY_MICRO_BATCH),
        (4, 1, 2, HISTORY),
        (3, 1, 1, EXACT),
        (3, 1, 1, HISTORY),
        (2, 2, 1, EVERY_MICRO_BATCH),
        (2, 2, 1, EXACT),
    ],
)
def test_no_plan_beats_it(num_ranks: int, home_slots: int, num_nodes: int, schedule: ReplicaSchedule) -> None:
    pricing = LayerPricing(num_ranks=num_ranks, num_nodes=num_nodes, constants=SLOW, replicas=schedule, has_trees=True)
    seconds, plans = PricedLayer(pricing=pricing), list(all_plans(num_ranks, home_slots))
    num_experts = num_ranks * home_slots
    rng, reached = np.random.default_rng(0), 0
    for skew in (1.0, 3.0):
        counts_RE = rng.poisson(20 * rng.lognormal(0, skew, num_experts), (num_ranks, num_experts))
        counts_RE[0, 0] += 1
        even = LayerCounts.of(even_load(int(counts_RE.sum()), num_experts, pricing))
        found = limit_s(counts_RE, 1, pricing, even)
        best = min(seconds(plan_RS, counts_RE) for plan_RS in plans)
        assert found <= best * (1 + 1e-12)
        assert found > 0.6 * best
        reached += found == pytest.approx(best, rel=0.02)
        bare = min(seconds(plan_RS, counts_RE) for plan_RS in plans if (plan_RS[:, -1] == EMPTY).all())
        assert limit_s(counts_RE, 0, pricing, even) <= bare * (1 + 1e-12)
    assert reached, "the bound is the best plan's time in some case"


@pytest.mark.parametrize(("price_tokens", "tokens"), [(300.0, 1600), (1.0, 1002), (1000.0, 2450), (10_000.0, 2900)])
def test_the_example(price_tokens: float, tokens: float) -> None:
    """One expert with 2,900 of 8,000 tokens on 8 ranks: 0, 1 or 2 transfers in a row."""
    counts_RE = np.zeros((8, 8), np.int64)
    counts_RE[0] = [2900, 900, 800, 800, 700, 700, 600, 600]
    pricing = LayerPricing(num_ranks=8, constants=LayerConstants(token_s=1.0, intra_replica_s=price_tokens))
    assert limit_s(counts_RE, 1, pricing, LayerCounts.of(even_load(8000, 8, pricing))) == tokens
