"""Replicas with every dispatcher of Megatron's: the losses are those of this project's all-to-all without replicas.

DeepEP and HybridEP need a GPU: a package with their names and semantics stands for them (`tests.support.deep_ep`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dist.test_homes import decisions
from tests.dist.test_replicas import AUTO, EXACT, HISTORY, MOVING, TOLERANCE, WITHOUT
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.deep_ep import train_with_deep_ep
from tests.support.marks import some_fast
from tests.support.replicas import balance, distance, simulated, train_with_stock_all_to_all
from tests.support.training import train

pytestmark = pytest.mark.dist

MODEL = f"{EP2} --num-layers 2 --moe-shared-expert-intermediate-size 64 --global-batch-size 2".split()
SHARED = "--moe-shared-expert-overlap"
CAPACITY = "--moe-expert-capacity-factor 1.0"
PADDED = f"{CAPACITY} --moe-pad-expert-input-to-capacity"
FLEX = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend"
TWO_SLOTS = ["--smartmoe-spare-slots", "2"]  # HybridEP wants an even number of slots on two ranks
# (flags of the model, flags of the dispatcher, those of the replicas, what trains)
MIXES = {
    "this project's all-to-all": ("", SHARED, EXACT, train),
    "allgather": ("", "--moe-token-dispatcher-type allgather", AUTO, train),
    "Megatron's all-to-all": ("", SHARED, EXACT, train_with_stock_all_to_all),
    "DeepEP, homes move": ("", f"{FLEX} deepep {SHARED}", [*MOVING, *EXACT[-2:]], train_with_deep_ep),
    "this project's all-to-all, dropping": (CAPACITY, "", HISTORY, train),
    "all-to-all, padded": (CAPACITY, PADDED, HISTORY, train),
    "HybridEP, padded": (CAPACITY, f"{FLEX} hybridep {PADDED}", [*HISTORY, *TWO_SLOTS], train_with_deep_ep),
    "allgather, dropping": (CAPACITY, "--moe-token-dispatcher-type allgather", EXACT, train),
}


@pytest.fixture(scope="module")
def losses_without(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Callable[[str], list[float]]:
    """Losses of this project's all-to-all without replicas."""

    @functools.cache
    def run(model: str) -> list[float]:
        return train(tmp_path_factory.mktemp("without"), 2, data_flags, *_flags(model), *WITHOUT, iterations=4)

    return run


def _flags(model: str) -> list[str]:
    return [*MODEL, *UNCLIPPED, *model.split()]


@pytest.mark.parametrize("mix", some_fast(MIXES, "allgather"))
def test_losses_and_balance(
    mix: str, tmp_path: Path, data_flags: list[str], losses_without: Callable[[str], list[float]]
) -> None:
    model, dispatcher, replicas, training = MIXES[mix]
    trace_file = tmp_path / "trace.npz"
    flags = [*_flags(model), *dispatcher.split(), "--smartmoe-record-trace", str(trace_file), *replicas]
    found = training(tmp_path, 2, data_flags, *flags, iterations=4)
    assert distance(found, losses_without(model)) < TOLERANCE
    lines = balance(tmp_path)
    assert np.sum(lines[-1]["copies"]) > 0
    split, homes = (np.ravel([line[name] for line in lines]) for name in ("split", "homes"))
    assert split.mean() < homes.mean()
    if "exact" not in replicas:
        spare_slots = 1 + (TWO_SLOTS[-1] == replicas[-1])
        result, _ = simulated(
            trace_file,
            num_ranks=2,
            spare_slots=spare_slots,
            replicas="history" if "history" in replicas else "auto",
        )
        assert split.tolist() == result.imbalance.tolist()


ETP = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2".split()
# dispatcher -> (its flags, what trains)
ACROSS_EXPERT_TENSOR_RANKS = {
    "allgather": ("--moe-token-dispatcher-type allgather", train),
    "Megatron's all-to-all": ("", train_with_stock_all_to_all),
    "DeepEP": (f"{FLEX} deepep", train_with_deep_ep),
}


def test_expert_tensor_parallelism(tmp_path: Path, data_flags: list[str]) -> None:
    """Homes that move and replicas, where two ranks hold a half of each expert, with every dispatcher."""
    flags = [*_flags(""), *ETP]
    expected = train(tmp_path / "without", 4, data_flags, *flags, *WITHOUT, iterations=4)
    for name, (dispatcher, training) in ACROSS_EXPERT_TENSOR_RANKS.items():
        run_dir = tmp_path / name
        found = training(run_dir, 4, data_flags, *flags, *dispatcher.split(), *MOVING, iterations=4)
        assert distance(found, expected) < TOLERANCE, name
        assert np.sum([line["copies"] for line in balance(run_dir)]) > 0, name
        assert decisions(run_dir), name
