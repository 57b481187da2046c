"""Copies of experts change nothing but who computes: the losses stay what they are without them.

Not bit for bit: an expert's gradient is a sum over tokens, and copies sum some of them apart. Everything else is equal:
each token's output, and the order in which its experts' outputs are added.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_smartmoe.runtime.decisions.command import main as replay
from megatron_smartmoe.spec.yaml_io import shipped_directory
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.checkpoints import tensors
from tests.support.marks import some_fast
from tests.support.replicas import ALWAYS, AT_ONCE, FAULTS, balance, distance, simulated, train_with_fault
from tests.support.training import train, two_layers

pytestmark = pytest.mark.dist

AUTO = [*ALWAYS, "--smartmoe-homes", "off"]
HISTORY = [*AUTO, "--smartmoe-replicas", "history"]
EXACT = [*AUTO, "--smartmoe-replicas", "exact"]
MOVING = [*ALWAYS, "--smartmoe-homes", "shuffle", "--smartmoe-homes-interval", "2"]
WITHOUT = ["--smartmoe", "--smartmoe-homes", "off"]
TOLERANCE = 1e-5  # of losses, relative

PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
OVERLAP = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather"
BUCKETS = "--ddp-bucket-size 40000"  # one for the experts of each layer: reduced in the middle of the backward pass
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MIXES = {
    "EP4": (4, "--expert-model-parallel-size 4", AUTO),
    "PP2xVPP2xEP2, overlapped, exact": (4, f"{VPP2} {EP2} {OVERLAP}", EXACT),
    "EP2xEDP2, overlapped, homes move": (4, f"{EP2} {OVERLAP} {BUCKETS}", MOVING),
    "TP2xEP2xETP2": (4, f"{TP2} {EP2}", AUTO),
    "PP2xVPP2xEP2, overlapped": (4, f"{VPP2} {EP2} {OVERLAP}", AUTO),
    "TP2xEP2xETP2, exact, experts recomputed, interleaved gates": (
        4,
        f"{TP2} {EP2} --recompute-granularity selective --recompute-modules moe --moe-mlp-glu-interleave-size 16",
        EXACT,
    ),
    "CP2xEP2, full recompute, shared experts, dense first layer": (
        4,
        f"--context-parallel-size 2 {EP2} {FULL} --moe-shared-expert-intermediate-size 64 "
        "--moe-layer-freq ([0]*1+[1]*3)",
        HISTORY,
    ),
}


@pytest.mark.parametrize("mix", some_fast(MIXES, "EP4"))
def test_copies_change_no_loss(mix: str, tmp_path: Path, data_flags: list[str]) -> None:
    world_size, flags, copies = MIXES[mix]
    common = [*flags.split(), *two_layers(flags), *UNCLIPPED]
    expected = train(tmp_path / "without", world_size, data_flags, *common, *WITHOUT, iterations=4)
    found = train(tmp_path / "with", world_size, data_flags, *common, *copies, iterations=4)
    assert distance(found, expected) < TOLERANCE
    last = balance(tmp_path / "with")[-1]
    assert np.sum(last["copies"]) > 0
    assert np.mean(last["split"]) < np.mean(last["homes"])


@pytest.mark.long
def test_200_steps_with_replicas(tmp_path: Path, data_flags: list[str]) -> None:
    """The learning rate keeps rounding errors small: top-k routing is chaotic, and at 1e-3 a learning rate that
    differs in its last bit alone takes the losses 4e-3 apart in 200 steps."""
    flags = [*EP2.split(), "--global-batch-size", "4", "--lr", "1e-4"]
    expected = train(tmp_path / "without", 2, data_flags, *flags, *WITHOUT, iterations=200)
    found = train(tmp_path / "with", 2, data_flags, *flags, *HISTORY, iterations=200)
    assert distance(found, expected) < TOLERANCE


def first_moments(
    run_dir: Path, data_flags: list[str], *flags: str, fault: str | None = None
) -> dict[str, torch.Tensor]:
    """Adam's first moments after one step, a tenth of its gradients; they show what losses hide."""
    save = ["--save", str(run_dir / "saved"), "--save-interval", "1"]
    everything = [*EP2.split(), *UNCLIPPED, *flags, *save]
    if fault is None:
        train(run_dir, 2, data_flags, *everything, iterations=1)
    else:
        train_with_fault(run_dir, 2, data_flags, *everything, iterations=1, fault=fault)
    return {name: tensor for name, tensor in tensors(run_dir / "saved", 1).items() if "exp_avg." in name}


@pytest.fixture(scope="module")
def moments_without_copies(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> dict[str, torch.Tensor]:
    return first_moments(tmp_path_factory.mktemp("without"), data_flags, *WITHOUT)


def largest_error(moments: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over the largest gradient of the same tensor."""
    assert moments.keys() == expected.keys() != set()
    errors = [(moments[name] - tensor).abs().max() / tensor.abs().max() for name, tensor in expected.items()]
    return float(max(errors))


def test_gradients_are_those_without_copies(
    tmp_path: Path, data_flags: list[str], moments_without_copies: dict[str, torch.Tensor]
) -> None:
    moments = first_moments(tmp_path, data_flags, *EXACT)
    assert np.sum(balance(tmp_path)[0]["copies"]) > 0
    assert largest_error(moments, moments_without_copies) <= 1e-6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_gradients_shows(
    fault: str, tmp_path: Path, data_flags: list[str], moments_without_copies: dict[str, torch.Tensor]
) -> None:
    moments = first_moments(tmp_path, data_flags, *EXACT, fault=fault)
    assert largest_error(moments, moments_without_copies) > 1e-3


def test_a_run_can_be_repeated_bit_for_bit(tmp_path: Path, data_flags: list[str]) -> None:
    flags = ["--expert-model-parallel-size", "4", "--num-layers", "2", *AUTO]
    first = train(tmp_path / "first", 4, data_flags, *flags, iterations=4)
    assert train(tmp_path / "second", 4, data_flags, *flags, iterations=4) == first
    files = [tmp_path / run / "replicas-stage0-group0.jsonl" for run in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes() != b""


def test_a_plan_on_the_device_is_that_of_the_host(tmp_path: Path, data_flags: list[str]) -> None:
    """With 2 ranks the host's search finds nothing that the greedy pass has not."""
    found = {}
    for place in ("host", "device"):
        flags = [*EP2.split(), *EXACT, "--smartmoe-plan-on", place]
        found[place] = train(tmp_path / place, 2, data_flags, *flags, iterations=3), balance(tmp_path / place)
    assert found["device"] == found["host"]
    assert np.sum(found["host"][1][-1]["copies"]) > 0
    line = "smartmoe: replicas of a micro-batch are planned on the device: --smartmoe-plan-on device\n"
    assert line in (tmp_path / "device" / "ranks" / "rank0.log").read_text()


def test_gradients_under_way_have_the_bits_of_those_waited_for(tmp_path: Path, data_flags: list[str]) -> None:
    """Relayed in rounds, of several micro-batches, and reduced over data-parallel ranks in the middle of the pass."""
    flags = ["--expert-model-parallel-size", "4", "--num-layers", "2", "--global-batch-size", "8"]
    flags += [*OVERLAP.split(), *BUCKETS.split()]
    under_way = train(tmp_path / "under way", 4, data_flags, *flags, *EXACT, iterations=3)
    waited_for = train_with_fault(tmp_path / "waited for", 4, data_flags, *flags, *EXACT, iterations=3, fault=AT_ONCE)
    assert under_way == waited_for
    assert np.sum(balance(tmp_path / "under way")[-1]["copies"]) > 0


def test_the_simulator_reproduces_the_balance(tmp_path: Path, data_flags: list[str]) -> None:
    """The trace of a run, replayed offline by the same planner: the same max / mean in every layer, to the last bit,
    and as many bytes of replicas."""
    trace_file = tmp_path / "trace.npz"
    flags = [
        "--expert-model-parallel-size",
        "4",
        "--global-batch-size",
        "8",
        "--smartmoe-record-trace",
        str(trace_file),
        "--smartmoe-record-micro-batches",
    ]
    train(tmp_path / "run", 4, data_flags, *flags, *AUTO, iterations=6)
    result, planned = simulated(trace_file, num_ranks=4)
    lines = balance(tmp_path / "run")
    assert np.ravel([line["split"] for line in lines]).tolist() == result.imbalance.tolist()
    anew_NLM = np.array([line["anew"] for line in lines])
    assert anew_NLM.shape[2] == 2
    assert (anew_NLM.any(axis=2) & ~anew_NLM.all(axis=2)).any(), "layers whose replicas from history serve one of two"
    assert anew_NLM.all(axis=2).any(), "layers whose replicas from history serve none, and do not go home"
    stats, expert_bytes = result.stats, 3 * 64 * 96 * 4
    assert sum(line["weight_bytes"] for line in lines) == stats.replicas_made * expert_bytes
    assert sum(line["gradient_bytes"] for line in lines) == stats.replicas_returned * expert_bytes
    assert 0 < stats.replicas_returned < stats.replicas_made
    assert 0 < np.mean([line["anew"] for line in lines]) < 1
    decisions = (tmp_path / "run" / "replicas-stage0-group0.jsonl").read_text().splitlines()
    assert planned == decisions
    assert {json.loads(line)["kind"] for line in decisions} == {"replicas", "replans"}


def random_routing(root: Path) -> list[str]:
    """Flags of a run that no history forecasts, on links on which transfers show; it saves every 3 iterations."""
    slower = (shipped_directory("clusters") / "cpu.yaml").read_text().replace("value: 1.7e9", "value: 1.2e9")
    (root / "slower.yaml").write_text(slower)
    return [
        *["--expert-model-parallel-size", "4", "--global-batch-size", "8", "--moe-router-force-load-balancing"],
        *["--smartmoe", "--smartmoe-spare-slots", "1", "--smartmoe-homes", "off", *OVERLAP.split()],
        *["--smartmoe-cluster", str(root / "slower.yaml"), "--save", str(root / "saved"), "--save-interval", "3"],
    ]


def tracing(file: Path) -> list[str]:
    return ["--smartmoe-record-trace", str(file), "--smartmoe-record-micro-batches"]


@pytest.fixture(scope="module")
def unforeseen(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """Directory of a run with `random_routing`, its trace, and what it saved."""
    root = tmp_path_factory.mktemp("unforeseen")
    train(root / "run", 4, data_flags, *random_routing(root), *tracing(root / "trace.npz"), iterations=8)
    return root


def test_the_simulator_reproduces_layers_that_are_suspended(unforeseen: Path) -> None:
    log = (unforeseen / "run" / "replicas-stage0-group0.jsonl").read_text().splitlines()
    result, planned = simulated(unforeseen / "trace.npz", num_ranks=4, priced_as=unforeseen / "run")
    assert planned == log
    plans = [decision for decision in map(json.loads, log) if decision["kind"] == "replicas"]
    suspended = ["suspended in" in decision["why"] for decision in plans]
    assert False in suspended[suspended.index(True) :], "suspended, and resumed"
    assert 0 < result.stats.suspended < result.stats.replans + result.stats.suspended
    lines, stats, expert_bytes = balance(unforeseen / "run"), result.stats, 3 * 64 * 96 * 4
    assert np.ravel([line["split"] for line in lines]).tolist() == result.imbalance.tolist()
    assert sum(line["weight_bytes"] for line in lines) == stats.replicas_made * expert_bytes
    assert sum(line["gradient_bytes"] for line in lines) == stats.replicas_returned * expert_bytes
    assert "those from history suspended in" in (unforeseen / "run" / "ranks" / "rank0.log").read_text()


def test_a_run_that_resumes_while_layers_are_suspended(unforeseen: Path, tmp_path: Path, data_flags: list[str]) -> None:
    """The plans begin where the checkpoint left them, as a replay shows. Losses cannot: Megatron resumes random routing
    with the numbers of the first rank on all ranks."""
    shutil.copytree(unforeseen / "saved", tmp_path / "saved")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("3")
    run_dir = tmp_path / "run"
    flags = [*random_routing(unforeseen), "--load", str(tmp_path / "saved")]
    train(run_dir, 4, data_flags, *flags, *tracing(run_dir / "trace.npz"), iterations=8)
    with np.load(run_dir / "decisions" / "start-000003-replicas-stage0-group0.npz") as state:
        assert 0 < state["suspended_L"].sum() < 4
    for run in (unforeseen / "run", run_dir):
        assert replay([str(run)]) == 0


def test_the_memory_is_what_the_planner_predicts(tmp_path: Path, data_flags: list[str]) -> None:
    """K slots of weights and float32 gradients for every layer, and nothing else that stays."""
    train(tmp_path, 2, data_flags, *EP2.split(), *HISTORY, iterations=2)
    log = (tmp_path / "ranks" / "rank0.log").read_text()
    parameters = 3 * 64 * 96  # of a SwiGLU expert
    mib = 4 * 1 * parameters * (4 + 4) / 2**20
    assert f"replicas: history, {mib:.1f} MiB on this rank" in log


def test_copies_that_do_not_pay_are_not_made(tmp_path: Path, data_flags: list[str]) -> None:
    flags = [*EP2.split(), "--smartmoe-homes", "off", "--smartmoe"]
    # On links this slow no computation hides a transfer.
    slow = (shipped_directory("clusters") / "cpu.yaml").read_text().replace("value: 1.7e9", "value: 1e5")
    (tmp_path / "slow.yaml").write_text(slow)
    dear = ["--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "1e6"]
    dear += ["--smartmoe-cluster", str(tmp_path / "slow.yaml")]
    expected = train(tmp_path / "without", 2, data_flags, *flags, iterations=4)
    assert train(tmp_path / "with", 2, data_flags, *flags, *dear, iterations=4) == expected
    last = balance(tmp_path / "with")[-1]
    assert not np.any(last["copies"])
    assert np.max(last["homes"]) > 1.05
