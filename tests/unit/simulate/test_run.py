"""The replay's stats and bounds, on cases small enough to do by hand."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.cost.replicas import ReplicaSchedule
from megatron_smartmoe.placement.decisions import Decision
from megatron_smartmoe.placement.layer_cost import Kept, LayerPricing, PricedLayer
from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Rule, Sees
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.simulate.baselines.eplb import Eplb
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp
from megatron_smartmoe.simulate.policies import OnlinePolicy, Planned, RulePolicy
from megatron_smartmoe.simulate.run import SimulationSetup, even_load_s, left_out, lower_bounds, price, replay
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.placement import EMPTY, Placement
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.synthetic import SyntheticSpec, synthetic_trace


@dataclass
class Flipping:
    """Swaps the homes of ranks 0 and 1 at every call and puts a replica of expert 0 into the free slot of the other
    rank."""

    sees: Sees = "history"
    name: str = "flipping"
    calls: int = 0

    def plan(self, problem: LayerProblem) -> LayerPlan:
        self.calls += 1
        slots = [[0, EMPTY], [1, 0]] if self.calls % 2 else [[1, 0], [0, EMPTY]]
        return LayerPlan(slots_RS=np.array(slots), split="equal")


def trace_of(*records: list[int], sources: int = 2) -> RoutingTrace:
    """Each record: tokens of expert 0 and 1 from the first source rank; the others route nothing."""
    counts = np.zeros((len(records), 1, sources, 2), np.uint32)
    counts[:, 0, 0] = records
    return RoutingTrace(counts=counts, iteration=np.arange(len(records)), layer=np.array([0]))


def setup(**changes: Any) -> SimulationSetup:
    given = {"num_ranks": 2, "spare_slots": 1, "warmup": 0, "constants": LayerConstants(token_s=1.0), "state_bytes": 7}
    return SimulationSetup(**{**given, **changes})


def start() -> Placement:
    return Placement.contiguous(num_layers=1, num_experts=2, num_ranks=2, spare_slots=1)


def test_stats_of_a_rule_that_flips() -> None:
    policy = RulePolicy(Flipping(), start(), num_groups=1, num_nodes=1, interval=1)
    result = replay(trace_of([6, 2], [6, 2], [6, 2]), policy, setup())
    assert result.imbalance.tolist() == [1.5, 1.25, 1.25]  # 6 | 2, then 3 | 5, then 5 | 3
    assert result.layer_s.tolist() == [6, 5, 5]
    stats = result.stats
    assert stats.plans == 2
    assert stats.slots_changed == 1 + 1  # a replica of expert 0; then expert 1 on rank 0 (expert 0 is on both)
    assert stats.experts_moved == 1  # expert 0 stays at home: rank 0 keeps a replica
    assert stats.replicas_made == 1 + 1


def test_only_records_after_warmup_count() -> None:
    policy = RulePolicy(Flipping(), start(), num_groups=1, num_nodes=1, interval=1)
    result = replay(trace_of([6, 2], [6, 2], [6, 2]), policy, setup(warmup=2))
    assert result.imbalance.tolist() == [1.25]
    assert result.stats.plans == 1


def test_an_interval_keeps_a_plan() -> None:
    rule = Flipping()
    replay(trace_of(*[[6, 2]] * 7), RulePolicy(rule, start(), num_groups=1, num_nodes=1, interval=3), setup())
    assert rule.calls == 2  # before iterations 1 and 4


def test_an_exact_rule_plans_every_group_and_micro_batch() -> None:
    rule = Flipping(sees="exact")
    counts = np.zeros((1, 1, 4, 2), np.uint32)
    counts[0, 0, ::2] = [6, 2]
    trace = RoutingTrace(counts=counts, iteration=np.arange(1), layer=np.array([0]))
    result = replay(trace, RulePolicy(rule, start(), 2, 1, 1), setup())
    assert rule.calls == 2
    assert len(result.imbalance) == 2


def test_what_has_no_assignments_is_left_out_and_counted() -> None:
    """Four records of three layers: layer 1 is dense, record 2 is empty, record 3 has one micro-batch of two."""
    counts = np.zeros((4, 3, 2, 2, 2), np.uint32)
    counts[:, [0, 2]] = [6, 2]
    counts[2], counts[3, :, :, 1] = 0, 0
    trace = RoutingTrace(counts=counts, iteration=np.array([10, 20, 30, 40]), layer=np.array([4, 5, 6]))
    placement = Placement.contiguous(num_layers=3, num_experts=2, num_ranks=2, spare_slots=1)
    rule = Flipping(sees="exact")
    result = replay(trace, RulePolicy(rule, placement, 1, 1, 1), setup(warmup=1))
    bounds = lower_bounds(trace, setup(warmup=1))
    assert len(result.imbalance) == len(bounds) == 2 * 2 + 2
    assert min(result.imbalance) >= 1
    assert bounds.min() >= 1
    found = left_out(trace, setup(warmup=1))
    assert (found.entries, found.of) == (2 + 3 + 1, 6 + 3 + 3)
    assert found.layers == (5,)
    assert found.iterations == (30,)


def test_lower_bounds_with_and_without_spare_slots() -> None:
    trace = trace_of([6, 3])
    assert lower_bounds(trace, setup()).tolist() == [pytest.approx(5 / 4.5)]
    assert lower_bounds(trace, setup(spare_slots=0)).tolist() == [pytest.approx(6 / 4.5)]


def test_ours_reaches_the_bound_on_a_steady_load() -> None:
    policy = OnlinePolicy(start(), 1, OnlineOptions(replicas="history"), PricedLayer(pricing=setup().pricing))
    result = replay(trace_of(*[[6, 2]] * 4), policy, setup(warmup=1))
    assert result.imbalance.tolist() == [1, 1, 1]
    assert result.stats.replicas_made == 3
    assert result.stats.slots_changed == 1
    assert [decision.kind for decision in result.decisions] == ["replicas"]


def flipping_load(records: int, flip_at: int) -> RoutingTrace:
    """4 experts, 2 ranks: experts 0 and 1 hot, from record `flip_at` on 0 and 3. Contiguous homes suit the second."""
    counts = np.zeros((records, 1, 2, 4), np.uint32)
    counts[:flip_at, 0, 0], counts[flip_at:, 0, 0] = [40, 40, 10, 10], [40, 10, 10, 40]
    return RoutingTrace(counts=counts, iteration=np.arange(records), layer=np.array([0]))


def homes_only(trace: RoutingTrace) -> tuple[list[Decision], OnlinePolicy]:
    start = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=2)
    options = OnlineOptions(homes_interval=4, review_records=2, policy=PolicyOptions(cooldown_iterations=6))
    policy = OnlinePolicy(start, 1, options, PricedLayer(pricing=setup().pricing))
    return replay(trace, policy, setup(spare_slots=0)).decisions, policy


def test_a_move_that_wins_is_reviewed_and_kept() -> None:
    decisions, policy = homes_only(flipping_load(8, 99))
    move, review = decisions
    assert (move.kind, review.kind) == ("homes", "review")
    assert move.taken
    assert review.iteration == move.iteration + 2
    assert review.predicted_gain_s == review.realised_gain_s == pytest.approx(30.0)  # 80 tokens on a rank, then 50
    assert review.why.startswith("found 30000.000 ms/iter on the loads since: kept")
    assert review.changes == ()
    assert policy.homes_planner.policy.losses == 0


def test_a_move_that_loses_is_reverted_and_the_next_one_waits_longer() -> None:
    decisions, policy = homes_only(flipping_load(14, 2))
    move, review, *later = decisions
    assert (move.kind, review.kind) == ("homes", "review")
    assert review.realised_gain_s == pytest.approx(-30.0)
    assert review.why.startswith("found -30000.000 ms/iter on the loads since: reverted, next attempt in 12 iterations")
    assert review.after == move.before
    assert review.moved_bytes == move.moved_bytes
    assert policy.homes(0).tolist() == [0, 0, 1, 1]
    assert policy.homes_planner.policy.cooldown_iterations == 12
    assert not any(decision.taken for decision in later)


BURST = {"kind": "burst", "burst_every": 6}
DRIFT = {"kind": "drifting", "drift": 0.1}


@pytest.mark.parametrize("kind", [BURST, DRIFT], ids=["burst", "drift"])
@pytest.mark.parametrize(("ranks", "experts", "spare"), [(4, 32, 2), (8, 32, 1), (8, 64, 2), (16, 64, 1)])
def test_never_worse_than_the_better_peer_under_bursts_and_drift(
    kind: dict[str, Any], ranks: int, experts: int, spare: int
) -> None:
    """By default better than both, UltraEP's exact counts included; from history alone, than both from history."""
    spec = SyntheticSpec(**kind, num_records=20, num_layers=1, num_sources=ranks, num_experts=experts, seed=ranks)
    trace = synthetic_trace(spec)
    begin = Placement.contiguous(num_layers=1, num_experts=experts, num_ranks=ranks, spare_slots=spare)
    given = setup(num_ranks=ranks, spare_slots=spare, warmup=4)

    def ours(**options: Any) -> FloatArray:
        policy = OnlinePolicy(begin, 1, OnlineOptions(homes_interval=0, **options), PricedLayer(pricing=given.pricing))
        return replay(trace, policy, given).imbalance

    def peer(rule: Rule) -> FloatArray:
        return replay(trace, RulePolicy(rule, begin, 1, 1, 1), given).imbalance

    by_default, eplb, ultraep = ours(), peer(Eplb()), peer(UltraEp(min_tokens_per_replica=1))
    ultraep_history = peer(UltraEp(sees="history", min_tokens_per_replica=1))
    assert by_default.mean() <= min(eplb.mean(), ultraep.mean())
    assert by_default.max() <= min(eplb.max(), ultraep.max())
    assert ours(replicas="history").mean() <= min(eplb.mean(), ultraep_history.mean())


def test_moves_of_homes_are_paid_for_over_the_iterations_of_a_record() -> None:
    """One expert of 7 bytes moves at 2 bytes/s before the third record, ten iterations after the second."""
    counts = np.zeros((3, 1, 2, 2), np.uint32)
    counts[:, 0, 0] = [6, 2]
    trace = RoutingTrace(counts=counts, iteration=np.array([10, 20, 30]), layer=np.array([0]))
    policy = RulePolicy(Flipping(), start(), num_groups=1, num_nodes=1, interval=1)
    result = replay(trace, policy, setup(migration_bytes_s=2.0))
    assert result.stats.experts_moved == 1
    assert sorted(result.moving_s.tolist()) == [0, 0, pytest.approx(7 / 2 / 10)]
    assert result.total_s == pytest.approx((6 + 5 + 5 + 0.35) / 3)


def test_the_even_load_is_the_mean_of_every_counted_layer() -> None:
    given = setup(constants=LayerConstants(token_s=1.0, fixed_s=0.5), warmup=1)
    assert even_load_s(trace_of([6, 2], [6, 2], [10, 0]), given).tolist() == [4.5, 5.5]


def test_auto_pays_for_the_replicas_that_it_does_not_use() -> None:
    """A burst: both experts' replicas from history were fetched, and another one is made for the counts."""
    prices = LayerPricing(num_ranks=2, constants=LayerConstants(intra_replica_s=8.0))
    planned = Planned(
        plan=LayerPlan(slots_RS=np.array([[0, EMPTY], [1, 0]]), split="exact"),
        mode="exact",
        kept=Kept(slots_RS=np.array([[0, 1], [1, EMPTY]])),
    )
    given = setup(prices={"exact": prices, "history": replace(prices, replicas=ReplicaSchedule(micro_batches=4))})
    policy = OnlinePolicy(start(), 1, OnlineOptions(), PricedLayer(pricing=given.pricing))
    seconds, _ = price(planned, np.array([[6, 2], [0, 0]]), policy, 0, given)
    assert seconds == pytest.approx(8.0 + 8.0 / 4)


@pytest.mark.parametrize(
    ("first", "replans", "made", "returned"), [([60, 20], 1, 1 + 1, 1 + 1), ([0, 80], 2, 1 + 2, 0 + 2)]
)
def test_replicas_from_history_are_fetched_once_and_returned_where_a_micro_batch_uses_them(
    first: list[int], replans: int, made: int, returned: int
) -> None:
    """Two micro-batches, in the last record the second or both with a burst of the other expert."""
    counts = np.zeros((3, 1, 2, 2, 2), np.uint32)
    counts[:, 0, 0] = [[[60, 20], [60, 20]], [[60, 20], [60, 20]], [first, [0, 80]]]
    trace = RoutingTrace(counts=counts, iteration=np.arange(3), layer=np.array([0]))
    policy = OnlinePolicy(start(), 1, OnlineOptions(homes_interval=0), PricedLayer(pricing=setup().pricing))
    stats = replay(trace, policy, setup(warmup=2)).stats
    assert (stats.replans, stats.replicas_made, stats.replicas_returned) == (replans, made, returned)
