"""A comparison in several processes has the numbers of one, an error in a worker is the error, and Ctrl-C ends all."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import pytest

from megatron_smartmoe.cost.moe_layer import LayerConstants
from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.placement.layer_cost import PricedLayer
from megatron_smartmoe.placement.layer_plan import Rule
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.simulate.baselines.eplb import Eplb
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp
from megatron_smartmoe.simulate.jobs import Entrant, compare
from megatron_smartmoe.simulate.policies import OnlinePolicy, RulePolicy, SimulatedPolicy
from megatron_smartmoe.simulate.run import SimulationSetup
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.synthetic import SyntheticSpec, synthetic_trace

# Of a fork: the other threads of a process of tests hold no lock that a worker needs.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SETUP = SimulationSetup(
    num_ranks=4,
    spare_slots=1,
    warmup=2,
    constants=LayerConstants(token_s=1e-6, intra_token_s=3e-7, intra_replica_s=1e-5),
    state_bytes=7,
    migration_bytes_s=1e5,
)


def start(num_layers: int) -> Placement:
    return Placement.contiguous(num_layers=num_layers, num_experts=8, num_ranks=4, spare_slots=1)


def ours(num_layers: int) -> SimulatedPolicy:
    options = OnlineOptions(homes_interval=2, state_bytes=7, migration_bytes_s=1e5)
    return OnlinePolicy(start(num_layers), 2, options, PricedLayer(pricing=SETUP.pricing_of("history", has_trees=True)))


def rule(one: Rule) -> Entrant:
    return Entrant(make=lambda num_layers: RulePolicy(one, start(num_layers), 2, 1, 1), layers_apart=True)


ENTRANTS = [Entrant(make=ours, layers_apart=False), rule(Eplb()), rule(UltraEp(min_tokens_per_replica=1))]


def trace() -> RoutingTrace:
    """Two groups and two micro-batches; in one record a layer has no tokens, in another it has them in one of these."""
    spec = SyntheticSpec(
        kind="drifting", num_records=7, num_layers=5, num_sources=8, num_experts=8, micro_batches=2, drift=0.3
    )
    drawn = synthetic_trace(spec)
    counts = drawn.counts.copy()
    counts[4, 1] = 0
    counts[5, 0, :, 1] = 0
    return replace(drawn, counts=counts)


def test_any_number_of_processes_finds_the_same() -> None:
    one, several = (compare(trace(), ENTRANTS, SETUP, jobs=jobs) for jobs in (1, 3))
    for alone, joined in zip(one.results, several.results, strict=True):
        for name in ("imbalance", "layer_s", "moving_s", "end_N"):
            assert np.array_equal(getattr(alone, name), getattr(joined, name)), (alone.name, name)
        assert [decision.to_line() for decision in joined.decisions] == [
            decision.to_line() for decision in alone.decisions
        ]
        counted = [replace(one.stats, plan_s=0.0, homes_s=0.0) for one in (alone, joined)]
        assert counted[0] == counted[1]
        assert alone.stats.replicas_made > 0
    assert np.array_equal(one.bounds, several.bounds)
    assert np.array_equal(one.even_s, several.even_s)
    assert np.array_equal(one.limit_s, several.limit_s)


def failing(_: int) -> NoReturn:
    raise PlanError("layer 3 cannot be planned")


def test_an_error_of_a_worker_is_the_error() -> None:
    with pytest.raises(PlanError, match=r"^layer 3 cannot be planned$"):
        compare(trace(), [Entrant(make=failing, layers_apart=False)], SETUP, jobs=2)


def test_a_killed_worker_names_the_flag() -> None:
    killed = Entrant(make=lambda _: os._exit(9), layers_apart=False)
    with pytest.raises(ConfigError, match=r"^--jobs = 2: a worker process was killed, .* Pass --jobs 1\.$"):
        compare(trace(), [killed], SETUP, jobs=2)


def test_ctrl_c_ends_all_processes_at_once(tmp_path: Path) -> None:
    code = """
import pathlib, signal, sys, time
from megatron_smartmoe.workers import ordered_map
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
def begin(path):
    pathlib.Path(path).touch()
    time.sleep(60)
list(ordered_map(begin, sys.argv[1:], workers=2, items_per_worker=1, start="fork"))
"""
    begun = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, "-c", code, *map(str, begun)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in begun) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) >= 2
    os.killpg(parent.pid, signal.SIGINT)
    parent.wait(timeout=20)
    assert not psutil.wait_procs(workers, timeout=20)[1]
