"""64 ranks on 8 nodes, one spare slot: homes even out the nodes, replicas the rest, and what homes leave."""

from typing import Literal

import pytest

from megatron_smartmoe.cli.policies import own_policy, peer_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import DEFAULT_CLUSTER, Prices, rank_tokens
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.simulate.run import PolicyResult, replay
from megatron_smartmoe.spec.placement import Placement
from tests.support.synthetic import SyntheticSpec, synthetic_trace

RANKS, EXPERTS = 64, 256


def replayed(kind: str, policy: ReplicaMode | Literal["laer"], homes_interval: int) -> PolicyResult:
    """15 records of one micro-batch, of which the last 12 count: as many as from one burst to the next."""
    trace = synthetic_trace(
        SyntheticSpec(kind=kind, num_records=15, num_layers=1, num_sources=RANKS, num_experts=EXPERTS, seed=2)
    )
    prices = Prices(
        cluster=DEFAULT_CLUSTER,
        expert=ExpertShape(hidden=4096, ffn=1536),
        num_ranks=RANKS,
        num_nodes=8,
        micro_batches=1,
        rank_tokens=rank_tokens(trace, RANKS),
    )
    setup = setup_of(prices, spare_slots=1, warmup=3)
    start = Placement.contiguous(num_layers=1, num_experts=EXPERTS, num_ranks=RANKS, spare_slots=1)
    if policy == "laer":
        return replay(trace, peer_policy("laer", start, 1, setup, interval=1), setup)
    return replay(trace, own_policy(policy, start, 1, setup, prices, homes_interval=homes_interval), setup)


@pytest.mark.parametrize(("kind", "policy", "limit"), [("drifting", "history", 1.05), ("burst", "auto", 1.05)])
def test_homes_even_out_the_nodes(kind: str, policy: ReplicaMode, limit: float) -> None:
    assert replayed(kind, policy, homes_interval=4).imbalance.mean() < limit


def test_a_steady_load_is_even_and_faster_than_with_the_fastest_peer() -> None:
    ours = replayed("lognormal", "history", homes_interval=4)
    assert replayed("lognormal", "history", homes_interval=0).imbalance.mean() > 1.05  # replicas that leave their nodes
    assert ours.imbalance.mean() < 1.015  # what is left pays for no replica
    assert ours.layer_s.mean() < 0.95 * replayed("lognormal", "laer", 0).layer_s.mean()
