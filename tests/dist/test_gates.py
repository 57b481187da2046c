"""Gates train the same model wherever experts live, recomputed or not, resumed or not.

In two mixes of parallelism with every run of the suite; in the others with `scripts/test.sh --long`, whose last
result is in docs/gates.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.gates.table import GATES
from tests.dist.test_parallel_equality import FP32_TOLERANCE, MIXES, largest_difference
from tests.dist.test_smartmoe_layer import UNCLIPPED
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
OFTEN_RUN = {  # every gate recomputed, and in one more mix, in turn
    mix: [gate for number, gate in enumerate(FLAGS) if turn is None or number % 2 == turn]
    for mix, turn in (("EP2, full recompute", None), ("TP2 folded into EP2", 0), ("CP2xEP2", 1))
}
VPP = "PP2xVPP2"  # needs a layer for each of four stages; the others have two
RUNS = [
    pytest.param(gate, mix, marks=[] if gate in OFTEN_RUN.get(mix, []) else [pytest.mark.long], id=f"{mix}-{gate}")
    for mix in MIXES
    for gate in FLAGS
]

Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Callable[[int], list[str]]:
    """Flags of a model with so many layers, and of its initial weights, which one process draws."""

    @functools.cache
    def flags(num_layers: int) -> list[str]:
        folder, layers = tmp_path_factory.mktemp("initial"), ["--num-layers", str(num_layers)]
        train(folder / "run", 1, data_flags, *layers, "--save", str(folder), "--save-interval", "1", iterations=1)
        return [*layers, "--load", str(folder), *INITIAL_WEIGHTS]

    return flags


@pytest.fixture(scope="module")
def losses_of(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str], initial: Callable[[int], list[str]]
) -> Losses:
    """Losses of a gate; each rank is a node of its own. What is compared several times is trained once."""

    @functools.cache
    def run(gate: str, world_size: int, num_layers: int, *flags: str) -> list[float]:
        shared = ["--smartmoe-gate", gate, *FLAGS[gate].split(), *UNCLIPPED, *initial(num_layers)]
        folder = tmp_path_factory.mktemp("run")
        return train(folder, world_size, data_flags, *shared, *flags, iterations=3, ranks_per_node=1)

    return run


def test_every_gate_is_trained() -> None:
    assert set(FLAGS) == set(GATES)


@pytest.mark.parametrize(("gate", "mix"), RUNS)
def test_every_mix_trains_what_it_trains_without_balancing(gate: str, mix: str, losses_of: Losses) -> None:
    """Bit for bit, recomputed or not; and what one process trains, where the gate does not depend on the ranks."""
    (world_size, flags), num_layers = MIXES[mix], 4 if mix == VPP else 2
    stay = STAY if GATES[gate].needs_layer else []
    stayed = losses_of(gate, world_size, num_layers, *flags.partition("--recompute")[0].split(), *stay)
    assert losses_of(gate, world_size, num_layers, *flags.split(), *SHUFFLE) == stayed
    assert len(set(stayed)) == 3
    if not GATES[gate].depends:
        assert largest_difference(stayed, losses_of(gate, 1, num_layers)) < FP32_TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("mix", ["TP2 folded into EP2", "CP2xEP2"])
@pytest.mark.parametrize("gate", ["gshard", "dynamic-capacity", "distributed-capacity"])
def test_gates_that_drop_nothing_train_what_one_process_trains(gate: str, mix: str, losses_of: Losses) -> None:
    """Their capacity alone depends on the ranks: losses and weights do not."""
    world_size, flags = MIXES[mix]
    wide = ["--moe-expert-capacity-factor", "8"]
    losses = losses_of(gate, world_size, 2, *flags.split(), *wide)
    assert largest_difference(losses, losses_of(gate, 1, 2, *wide)) < FP32_TOLERANCE


RESUMED = {
    "noisy-top-k": ("noise_weight", ""),
    "moe++": ("residual_weight", f"--smartmoe-gate moe++ --smartmoe-gate-residuals off {AUX_LOSS} --smartmoe"),
}


@pytest.mark.parametrize("gate", RESUMED)
def test_a_gate_with_parameters_is_saved_and_loaded(gate: str, tmp_path: Path, data_flags: list[str]) -> None:
    """Resumed it trains what the uninterrupted run trains; checkpoints go to a gate without them and back."""
    parameter, without = RESUMED[gate]
    shared = [*UNCLIPPED, "--num-layers", "2"]
    stay = STAY if GATES[gate].needs_layer else []
    its = ["--smartmoe-gate", gate, *FLAGS[gate].split(), *stay, *shared]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "2"]
    whole = train(tmp_path / "whole", 1, data_flags, *its, *save, iterations=4)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    load = ["--load", str(tmp_path / "saved")]
    assert train(tmp_path / "resumed", 1, data_flags, *its, *load, iterations=4) == whole[2:]
    # to one without these parameters, and back
    plain = [*shared, *without.split(), "--save", str(tmp_path / "plain"), "--save-interval", "1"]
    assert train(tmp_path / "without", 1, data_flags, *plain, *load, *INITIAL_WEIGHTS, iterations=1) != whole[2:3]
    back = ["--load", str(tmp_path / "plain"), *INITIAL_WEIGHTS]
    train(tmp_path / "back", 1, data_flags, *its, *back, iterations=1)
    line = f"was saved with another gate and has no {parameter} of the routers: training starts with the initial values"
    assert line in (tmp_path / "back" / "ranks" / "rank0.log").read_text()
    assert line not in (tmp_path / "resumed" / "ranks" / "rank0.log").read_text()
