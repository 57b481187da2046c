"""Checkpoints of `--smartmoe` and stock runs load into each other, wherever the experts lived when they were saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.test_checkpoints import OPTIMIZERS
from tests.dist.test_parallel_equality import FP32_TOLERANCE, largest_difference
from tests.dist.test_smartmoe_layer import UNCLIPPED
from tests.support.homes import train_with_homes
from tests.support.training import train

pytestmark = pytest.mark.dist

EP2 = "--expert-model-parallel-size 2".split()
Train = Callable[..., list[float]]


def with_random_homes(
    run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int
) -> list[float]:
    return train_with_homes(run_dir, world_size, data_flags, "--smartmoe", *flags, iterations=iterations, seed=3)


def with_smartmoe(run_dir: Path, world_size: int, data_flags: list[str], *flags: str, iterations: int) -> list[float]:
    return train(run_dir, world_size, data_flags, "--smartmoe", *flags, iterations=iterations)


KINDS: dict[str, Train] = {"stock": train, "smartmoe": with_smartmoe, "smartmoe, random homes": with_random_homes}


class Saved:
    """The same 4 steps, saved after the second by every kind of run."""

    def __init__(self, root: Path, data_flags: list[str], optimizer: str) -> None:
        self.root, self.flags = root, [*data_flags, *UNCLIPPED, *OPTIMIZERS[optimizer]]
        self.losses = {kind: self._run(kind) for kind in KINDS}

    def _run(self, kind: str) -> list[float]:
        save = ["--save", str(self.checkpoint(kind)), "--save-interval", "2", *EP2]
        losses = KINDS[kind](self.root / f"run {kind}", 2, self.flags, *save, iterations=4)
        (self.checkpoint(kind) / "latest_checkpointed_iteration.txt").write_text("2")  # as if killed before step 4
        return losses

    def checkpoint(self, kind: str) -> Path:
        return self.root / f"checkpoint of {kind}"

    def resume(self, kind: str, run: Train, run_dir: Path, world_size: int, *flags: str) -> list[float]:
        return run(run_dir, world_size, self.flags, "--load", str(self.checkpoint(kind)), *flags, iterations=4)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"), data_flags, request.param)


def test_all_kinds_trained_the_same(saved: Saved) -> None:
    assert saved.losses["smartmoe"] == saved.losses["smartmoe, random homes"] == saved.losses["stock"]


@pytest.mark.parametrize(
    ("kind", "resumed"), [("stock", "smartmoe"), ("smartmoe", "stock"), ("smartmoe, random homes", "stock")]
)
def test_resumed_losses_are_bit_equal(saved: Saved, kind: str, resumed: str, tmp_path: Path) -> None:
    assert saved.resume(kind, KINDS[resumed], tmp_path, 2, *EP2) == saved.losses["stock"][2:]


MIXES = {
    "EP4": (4, "--expert-model-parallel-size 4"),
    "EP2xPP2": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "ETP2xEP2": (4, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
}


@pytest.mark.parametrize("mix", MIXES)
def test_resumed_at_another_parallelism(saved: Saved, mix: str, tmp_path: Path) -> None:
    world_size, flags = MIXES[mix]
    losses = saved.resume("smartmoe, random homes", with_smartmoe, tmp_path, world_size, *flags.split())
    assert largest_difference(losses, saved.losses["stock"][2:]) < FP32_TOLERANCE


def test_stock_resumes_from_expert_tensor_parallelism(tmp_path: Path, data_flags: list[str]) -> None:
    flags = [*data_flags, *UNCLIPPED, "--override-opt-param-scheduler"]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "2"]
    etp2 = MIXES["ETP2xEP2"][1].split()
    with_random_homes(tmp_path / "first", 4, flags, *save, *etp2, iterations=2)
    resumed = {
        kind: KINDS[kind](tmp_path / kind, 4, flags, "--load", str(tmp_path / "saved"), *etp2, iterations=4)
        for kind in ("stock", "smartmoe")
    }
    assert resumed["stock"] == resumed["smartmoe"]
