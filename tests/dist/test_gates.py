"""Gates train the same model wherever experts live, recomputed or not, resumed or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.gates.table import GATES
from tests.dist.test_parallel_equality import EP2, FP32_TOLERANCE, MIXES, largest_difference
from tests.dist.test_smartmoe_layer import UNCLIPPED
from tests.support.marks import some_fast
from tests.support.training import INITIAL_WEIGHTS, train

pytestmark = pytest.mark.dist

AUX_LOSS = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1"
FLAGS = {
    "naive": "",
    "switch": f"{AUX_LOSS} --moe-router-topk 1",
    "noisy-top-k": AUX_LOSS,
    "gshard": AUX_LOSS,
    "base": "--moe-router-topk 1",
    "swipe": "",
    "dynamic-capacity": AUX_LOSS,
    "distributed-capacity": AUX_LOSS,
    "topology": f"{AUX_LOSS} --smartmoe-gate-outgoing 0.3",
    "moe++": AUX_LOSS,
}
STAY = "--smartmoe --smartmoe-homes off".split()
SHUFFLE = "--smartmoe --smartmoe-homes shuffle --smartmoe-homes-interval 1".split()
LAYERS = ("--num-layers", "2")

Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Losses:
    """Runs are compared with several others: each is made once."""

    @functools.cache
    def run(gate: str, world_size: int, *flags: str, iterations: int = 3) -> list[float]:
        flags = ("--smartmoe-gate", gate, *FLAGS[gate].split(), *UNCLIPPED, *flags)
        return train(tmp_path_factory.mktemp("run"), world_size, data_flags, *flags, iterations=iterations)

    return run


def test_every_gate_is_trained() -> None:
    assert set(FLAGS) == set(GATES)


@pytest.mark.parametrize("gate", some_fast(["noisy-top-k", "gshard", "base", "swipe"], "noisy-top-k"))
def test_neither_moving_experts_nor_recomputation_changes_a_loss(gate: str, losses_of: Losses) -> None:
    recomputed = MIXES["EP2, full recompute"][1].split()
    moved = losses_of(gate, 2, *recomputed, *SHUFFLE, *LAYERS)
    stayed = losses_of(gate, 2, *EP2.split(), *STAY, *LAYERS)
    assert moved == stayed
    assert len(set(stayed)) == 3


@pytest.mark.long
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gate", FLAGS)
def test_every_mix_trains_what_it_trains_without_balancing(
    gate: str, mix: str, losses_of: Losses, initial_weights: list[str]
) -> None:
    """Bit for bit; and what one process trains, where the gate does not depend on the ranks."""
    world_size, flags = MIXES[mix]
    stay = STAY if GATES[gate].needs_layer else []
    plain = losses_of(gate, world_size, *flags.split(), *initial_weights, *stay)
    assert losses_of(gate, world_size, *flags.split(), *initial_weights, *SHUFFLE) == plain
    if not GATES[gate].depends:
        assert largest_difference(plain, losses_of(gate, 1, *initial_weights)) < FP32_TOLERANCE


def test_a_gate_with_parameters_is_saved_and_loaded(tmp_path: Path, data_flags: list[str]) -> None:
    """Resumed it draws what the uninterrupted run draws; checkpoints go from gate to gate, with a line."""
    noisy = ["--smartmoe-gate", "noisy-top-k", *AUX_LOSS.split(), *UNCLIPPED, *LAYERS]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "2"]
    whole = train(tmp_path / "whole", 1, data_flags, *noisy, *save, iterations=4)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    load = ["--load", str(tmp_path / "saved")]
    assert train(tmp_path / "resumed", 1, data_flags, *noisy, *load, iterations=4) == whole[2:]
    # another gate, and back
    plain = [*UNCLIPPED, *LAYERS, "--save", str(tmp_path / "plain"), "--save-interval", "1"]
    assert train(tmp_path / "without", 1, data_flags, *plain, *load, *INITIAL_WEIGHTS, iterations=1) != whole[2:3]
    back = ["--load", str(tmp_path / "plain"), *INITIAL_WEIGHTS]
    train(tmp_path / "back", 1, data_flags, *noisy, *back, iterations=1)
    line = "was saved with another gate and has no noise_weight of the routers: training starts with the initial values"
    assert line in (tmp_path / "back" / "ranks" / "rank0.log").read_text()
    assert line not in (tmp_path / "resumed" / "ranks" / "rank0.log").read_text()
