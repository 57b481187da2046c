"""A simulation with the compiled functions is the one with numpy's, to the last bit; long traces get the former."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.cli.kernels import WORTH_LOADING, kernels_for
from megatron_smartmoe.cli.policies import own_policy, setup_of
from megatron_smartmoe.cli.simulate_prices import Prices
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.runtime.replicas.kernels import COMPILED, fastest_kernels
from megatron_smartmoe.simulate.run import PolicyResult, replay
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.synthetic import SyntheticSpec, synthetic_trace
from tests.unit.ops.test_placement import needs_library

pytestmark = needs_library
RANKS, EXPERTS, SPARE = 32, 64, 1  # more than 16 ranks are planned in another way than fewer
DRIFT = SyntheticSpec(kind="drifting", num_records=10, num_layers=2, num_sources=32, num_experts=64, skew=1.5)


def simulated(mode: ReplicaMode, trace: RoutingTrace, kernels: Kernels) -> PolicyResult:
    """Homes are re-evaluated every 4 iterations, so that moves are made and reviewed."""
    prices = Prices(
        cluster=load_cluster_spec(Path("h100-sxm")),
        expert=ExpertShape(hidden=1024, ffn=4096),
        num_ranks=RANKS,
        num_nodes=4,
        micro_batches=1,
        rank_tokens=DRIFT.tokens_per_source * DRIFT.top_k,
        margin=1.0,
    )
    setup = setup_of(prices, spare_slots=SPARE, warmup=1, kernels=kernels)
    start = Placement.contiguous(num_layers=2, num_experts=EXPERTS, num_ranks=RANKS, spare_slots=SPARE)
    policy = own_policy(mode, start, 1, setup, prices, homes_interval=4)
    return replay(trace, policy, setup)


@pytest.mark.parametrize("mode", ["history", "exact", "auto"])
def test_a_simulation_has_the_same_bits(mode: ReplicaMode) -> None:
    trace = synthetic_trace(DRIFT)
    slow, fast = (simulated(mode, trace, kernels) for kernels in (NUMPY, COMPILED))
    assert slow.stats.replicas_made > 0
    assert any(decision.kind == "homes" for decision in slow.decisions)
    for name in ("imbalance", "layer_s", "moving_s"):
        assert np.array_equal(getattr(fast, name), getattr(slow, name))
    assert [one.to_line() for one in fast.decisions] == [one.to_line() for one in slow.decisions]


def test_without_torch_a_note_says_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels_for(14_500, 64) is NUMPY
    assert capsys.readouterr().err == (
        "note: planning 14,500 layers with numpy, which takes 3 to 20 times as long as the compiled library. "
        "Install torch and build it: scripts/setup.sh.\n"
    )
    kernels_for(100, 8)
    assert not capsys.readouterr().err


def test_torch_is_loaded_where_that_pays() -> None:
    assert fastest_kernels() is COMPILED
    assert kernels_for(WORTH_LOADING // 64 + 1, 64) is COMPILED
    assert kernels_for(100, 8) is NUMPY
