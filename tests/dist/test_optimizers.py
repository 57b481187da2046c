"""Optimizers other than Adam: experts in slots are trained as stock Megatron's, and their state moves with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.test_homes import SHUFFLE
from tests.dist.test_replicas import EXACT, TOLERANCE, WITHOUT, distance
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.checkpoints import different, tensors
from tests.support.training import train

pytestmark = pytest.mark.dist

STATE = {"muon": "momentum_buffer", "lion": "exp_avg"}
OFFLOAD = (
    "--optimizer-cpu-offload --use-precision-aware-optimizer --optimizer-offload-fraction 0.5 "
    "--use-distributed-optimizer --bf16 --dist-ckpt-optim-fully-reshardable"
)
BF16_TOLERANCE = 1e-4  # replicas round an expert's bf16 gradient in parts; 1e-5 is seen


def _train(run_dir: Path, data_flags: list[str], *flags: str) -> list[float]:
    save = ["--save", str(run_dir / "saved"), "--save-interval", "4"]
    return train(run_dir, 2, data_flags, *EP2.split(), *UNCLIPPED, *flags, *save, iterations=4)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("lion", marks=pytest.mark.long)])
def test_migrations_and_replicas_train_what_stock_megatron_trains(
    optimizer: str, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = ["--optimizer", optimizer]
    stock = _train(tmp_path / "stock", data_flags, *flags)
    assert _train(tmp_path / "shuffled", data_flags, *flags, *SHUFFLE) == stock
    found, expected = (tensors(tmp_path / kind / "saved", 4) for kind in ("shuffled", "stock"))
    assert not different(found, expected)
    assert any(STATE[optimizer] in name and "experts" in name for name in expected)
    replicas = _train(tmp_path / "replicas", data_flags, *flags, *EXACT)
    assert replicas != stock
    assert distance(replicas, stock) < TOLERANCE


def test_the_layer_wise_optimizer(tmp_path: Path, data_flags: list[str]) -> None:
    """It gives whole parameters to single ranks of the expert-data-parallel group, of which there are two here."""
    flags = [*EP2.split(), *UNCLIPPED, *"--optimizer muon --use-distributed-optimizer --bf16".split()]
    flags += ["--dist-ckpt-optim-fully-reshardable"]

    def run(name: str, *loops: str) -> list[float]:
        save = ["--save", str(tmp_path / name / "saved"), "--save-interval", "4"]
        return train(tmp_path / name, 4, data_flags, *flags, *loops, *save, iterations=4)

    expected = run("without", *WITHOUT)
    assert run("shuffled", *SHUFFLE) == expected
    found, wanted = (tensors(tmp_path / kind / "saved", 4) for kind in ("shuffled", "without"))
    assert not different(found, wanted)
    assert any("momentum_buffer" in name and "experts" in name for name in wanted)
    assert distance(run("replicas", *EXACT), expected) < BF16_TOLERANCE


def test_state_on_the_cpu(tmp_path: Path, data_flags: list[str]) -> None:
    """Half of the parameters are updated on the CPU: Megatron's HybridDeviceOptimizer in the distributed optimizer."""
    flags = [*EP2.split(), *UNCLIPPED, *OFFLOAD.split()]

    def run(name: str, *loops: str) -> list[float]:
        save = ["--save", str(tmp_path / name / "saved"), "--save-interval", "4"]
        return train(tmp_path / name, 2, data_flags, *flags, *loops, *save, iterations=4)

    stock = run("stock")
    assert run("shuffled", *SHUFFLE) == stock
    found, wanted = (tensors(tmp_path / kind / "saved", 4) for kind in ("shuffled", "stock"))
    assert not different(found, wanted)
