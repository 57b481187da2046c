"""Prediction blocks (MTP) have MoE layers too: they are balanced, recorded and saved under numbers of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.spec.trace import load_trace
from tests.dist.test_homes import DISTRIBUTED, PP2, SHUFFLE, STAY, compare, decisions
from tests.dist.test_replicas import EXACT, HISTORY, TOLERANCE, WITHOUT, distance
from tests.dist.test_smartmoe_layer import EP2, UNCLIPPED
from tests.support.checkpoints import different, tensors
from tests.support.replicas import balance
from tests.support.training import losses, train

pytestmark = pytest.mark.dist

TWO = f"{EP2} --mtp-num-layers 2"
NUMBERS = [0, 1, 2, 3, 4, 5]  # 4 layers, then the 2 of the prediction blocks
REPEATED = f"{TWO} --mtp-use-repeated-layer"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
LAYOUT = f"{PP2} --pipeline-model-parallel-layout"
MIXES = {
    "PP2xEP2xEDP2, distributed optimizer": (8, f"{PP2} {DISTRIBUTED} --bf16 {TWO}"),
    "PP2xVPP2xEP2": (4, f"{VPP2} {TWO}"),
    "PP2xEP2, a stage of prediction blocks alone": (4, f"{LAYOUT} Etttt|mmL {TWO} {DISTRIBUTED}"),
    # Megatron's fully parallel save, which is the default, is refused with this layout.
    "PP2xVPP2xEP2, prediction blocks on the first rank": (
        4,
        f"{LAYOUT} Et|tt|tmm|L {TWO} --no-ckpt-fully-parallel-save",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("mix", MIXES)
def test_40_steps_with_a_migration_every_5(mix: str, tmp_path: Path, data_flags: list[str]) -> None:
    world_size, flags = MIXES[mix]
    moves = compare(tmp_path, world_size, data_flags, f"{flags} --global-batch-size 4", iterations=40, every=5)
    assert moves == 40 // 5 - 1


class Saved:
    """The same 4 steps of stock Megatron and of `--smartmoe` with forced migrations, saved after the second."""

    def __init__(self, root: Path, data_flags: list[str]) -> None:
        self.root, self._flags = root, [*data_flags, *TWO.split(), *DISTRIBUTED.split(), *UNCLIPPED]
        self.trace = root / "trace.npz"
        kinds = {"stock": [], "smartmoe": [*SHUFFLE, "--smartmoe-record-trace", str(self.trace)]}
        self.losses = {kind: self.train(kind, *kinds[kind], *self._save(kind)) for kind in kinds}
        for kind in kinds:
            (self.checkpoint(kind) / "latest_checkpointed_iteration.txt").write_text("2")

    def train(self, name: str, *flags: str, iterations: int = 4) -> list[float]:
        return train(self.root / name, 2, self._flags, *flags, iterations=iterations)

    def checkpoint(self, kind: str) -> Path:
        return self.root / f"checkpoint of {kind}"

    def _save(self, kind: str) -> list[str]:
        return ["--save", str(self.checkpoint(kind)), "--save-interval", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"), data_flags)


def test_migrations_keep_stock_losses_and_parameters(saved: Saved) -> None:
    assert saved.losses["smartmoe"] == saved.losses["stock"]
    found, expected = (tensors(saved.checkpoint(kind), 4) for kind in ("smartmoe", "stock"))
    assert not different(found, expected)
    assert any(name.startswith("mtp.layers.1.") and "experts" in name for name in expected)


@pytest.mark.parametrize(("kind", "flags"), [("smartmoe", []), ("stock", STAY)])
def test_checkpoints_load_both_ways(kind: str, flags: list[str], saved: Saved) -> None:
    resumed = saved.train(f"resumed from {kind}", *flags, "--load", str(saved.checkpoint(kind)))
    assert resumed == saved.losses["stock"][2:]


def test_their_layers_have_numbers_of_their_own(saved: Saved) -> None:
    trace = load_trace(saved.trace)
    assert trace.layer.tolist() == NUMBERS
    routed_L = trace.counts.sum(axis=(0, 2, 3))
    assert (routed_L == routed_L[0]).all()
    moved = decisions(saved.root / "smartmoe")[0]["changes"]
    assert {layer for layer, *_ in moved} == set(NUMBERS)


def test_replicas_change_no_loss(saved: Saved) -> None:
    """Planned from each micro-batch, and switched by a pool that is evaluated after every second step."""
    found = saved.train("replicas", *EXACT, "--smartmoe-pool", "auto", "--smartmoe-pool-interval", "2")
    assert distance(found, saved.losses["stock"]) < TOLERANCE
    first = balance(saved.root / "replicas")[0]
    assert first["layers"] == NUMBERS
    assert np.sum(first["copies"][4:]) > 0


def test_a_repeated_layer(tmp_path: Path, data_flags: list[str]) -> None:
    """One layer for all prediction depths: a micro-batch goes through it twice, and its replicas' gradients add up."""
    flags = [*REPEATED.split(), *UNCLIPPED]
    expected = train(tmp_path / "without", 2, data_flags, *flags, *WITHOUT, iterations=4)
    found = train(tmp_path / "with", 2, data_flags, *flags, *HISTORY, iterations=4)
    assert distance(found, expected) < TOLERANCE
    last = balance(tmp_path / "with")[-1]
    assert last["layers"] == NUMBERS[:5]
    assert len(last["copies"][4]) == 2 * len(last["copies"][0])
    assert sum(last["copies"][4]) > 0
    assert losses(tmp_path / "with") == found
