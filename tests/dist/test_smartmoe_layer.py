"""`--smartmoe` trains what stock Megatron trains, to the last bit, wherever the experts live."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.test_parallel_equality import MIXES
from tests.support.homes import train_with_homes
from tests.support.marks import some_fast
from tests.support.training import train, two_layers

pytestmark = pytest.mark.dist

# Megatron's gradient norm adds up one norm per parameter, and slots are fewer and larger parameters than experts: with
# clipping the losses differ in their last bits (see CLIPPED_TOLERANCE), without they do not.
UNCLIPPED = ("--clip-grad", "0")
CLIPPED_TOLERANCE = 1e-6  # relative; 2e-7 is seen

EP2 = "--expert-model-parallel-size 2"
MORE_MIXES = {
    **MIXES,
    "EP2, MoE recompute": (2, f"{EP2} --recompute-granularity selective --recompute-modules moe"),
    "EP2, shared experts, dense first layer": (
        2,
        f"{EP2} --moe-shared-expert-intermediate-size 64 --moe-layer-freq ([0]*1+[1]*3)",
    ),
    "EP2, top-4": (2, f"{EP2} --moe-router-topk 4"),
    "EP2, aux loss, expert bias": (
        2,
        f"{EP2} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    ),
    "EP2, sinkhorn": (2, f"{EP2} --moe-router-load-balancing-type sinkhorn --moe-router-topk 1"),
    "EP2, group-limited": (2, f"{EP2} --moe-router-num-groups 4 --moe-router-group-topk 2"),
    "EP2, dropping": (2, f"{EP2} --moe-expert-capacity-factor 0.8"),
    "EP2, padded to capacity": (2, f"{EP2} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity"),
    "EP2, allgather": (2, f"{EP2} --moe-token-dispatcher-type allgather"),
    "ETP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"),
}


Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Losses:
    """Runs are compared with several others: each is made once."""

    @functools.cache
    def run(world_size: int, flags: str, *more: str) -> list[float]:
        run_dir = tmp_path_factory.mktemp("run")
        everything = [*flags.split(), *two_layers(flags), *UNCLIPPED, *more]
        return train(run_dir, world_size, data_flags, *everything, iterations=4)

    return run


@pytest.mark.parametrize("mix", some_fast(MORE_MIXES, "EP2"))
def test_losses_are_those_of_stock_megatron(mix: str, losses_of: Losses) -> None:
    world_size, flags = MORE_MIXES[mix]
    stock = losses_of(world_size, flags)
    assert losses_of(world_size, flags, "--smartmoe") == stock
    assert stock[-1] < stock[0] - 0.05


HOMES = {
    "one rank": (1, ""),
    "EP2": (2, EP2),
    "EP2, top-4": (2, f"{EP2} --moe-router-topk 4"),
    "EP2, top-8": (2, f"{EP2} --moe-router-topk 8"),
    "EP2, dropping": (2, f"{EP2} --moe-expert-capacity-factor 0.8"),
    "EP2, aux loss, expert bias": MORE_MIXES["EP2, aux loss, expert bias"],
    "EP4": (4, "--expert-model-parallel-size 4"),
    "PP2xEP2": (4, f"--pipeline-model-parallel-size 2 {EP2}"),
    "EP2xEDP2, overlapped": MIXES["EP2xEDP2, overlapped"],
    "TP2xEP2": (4, f"--tensor-model-parallel-size 2 --sequence-parallel {EP2}"),
    "EP2, allgather": (2, f"{EP2} --moe-token-dispatcher-type allgather"),
    "EP2, bf16": (2, f"{EP2} --bf16"),
}


@pytest.mark.parametrize("mix", some_fast(HOMES, "EP2"))
def test_losses_do_not_depend_on_where_experts_live(
    mix: str, tmp_path: Path, data_flags: list[str], losses_of: Losses
) -> None:
    world_size, flags = HOMES[mix]
    everything = [*flags.split(), *two_layers(flags), *UNCLIPPED, "--smartmoe"]
    moved = train_with_homes(tmp_path, world_size, data_flags, *everything, iterations=4, seed=5)
    assert moved == losses_of(world_size, flags, "--smartmoe")


@pytest.mark.fast
def test_a_wrong_table_is_noticed(tmp_path: Path, data_flags: list[str], losses_of: Losses) -> None:
    """The equality above can fail: tables that do not match where the weights are give other losses."""
    everything = [*EP2.split(), *two_layers(EP2), *UNCLIPPED, "--smartmoe"]
    wrong = train_with_homes(tmp_path, 2, data_flags, *everything, iterations=4, seed=5, move_weights=False)
    assert wrong[0] != losses_of(2, EP2, "--smartmoe")[0]


def test_clipping_differs_in_the_last_bits_only(tmp_path: Path, data_flags: list[str]) -> None:
    stock = train(tmp_path / "stock", 2, data_flags, *EP2.split(), "--clip-grad", "0.5", iterations=6)
    ours = train(tmp_path / "ours", 2, data_flags, *EP2.split(), "--clip-grad", "0.5", "--smartmoe", iterations=6)
    worst = max(abs(a - b) / b for a, b in zip(ours, stock, strict=True))
    print(f"largest relative difference with clipping: {worst:.1e}")
    assert worst < CLIPPED_TOLERANCE
