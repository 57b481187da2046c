"""Every mix of parallelism trains the same model: its losses are those of one process, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.marks import some_fast
from tests.support.training import train

pytestmark = pytest.mark.dist

FP32_TOLERANCE = 1e-6  # relative; 1e-7 is seen: sums over ranks and chunks are taken in another order
BF16_TOLERANCE = 2e-3  # relative; bf16 keeps 8 bits

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
MIXES = {
    "EP2": (2, EP2),
    "EP4": (4, "--expert-model-parallel-size 4"),
    "PP2": (2, PP2),
    "TP2+SP": (2, TP2),
    "PP2xEP2": (4, f"{PP2} {EP2}"),
    "EP2xEDP2, distributed optimizer": (4, f"{EP2} --use-distributed-optimizer"),
    "EP2xEDP2, overlapped": (4, f"{EP2} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "TP2 folded into EP2": (2, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "TP2xEP2": (4, f"{TP2} {EP2}"),
    "PP2xVPP2": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "CP2": (2, "--context-parallel-size 2"),
    "CP2xEP2": (2, f"--context-parallel-size 2 {EP2}"),
    "EP2, full recompute": (
        2,
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
BF16_MIXES = (  # with fp32 every mix; what bf16 changes are messages, norms and the optimizer, each of which is here
    "EP2",
    "TP2+SP",
    "PP2xVPP2",
    "EP2xEDP2, distributed optimizer",
    "CP2",
    *(pytest.param(mix, marks=pytest.mark.long) for mix in ("PP2", "PP2xEP2", "TP2 folded into EP2")),
)


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of any step. Printed: `pytest -rP` shows how much room there is."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
    print(f"largest relative difference of {len(losses)} losses: {difference:.1e}")
    return difference


@pytest.mark.parametrize("mix", some_fast(MIXES, "PP2xEP2"))
def test_fp32_losses_equal_the_single_process(
    mix: str, tmp_path: Path, data_flags: list[str], initial_weights: list[str], reference_losses: list[float]
) -> None:
    world_size, flags = MIXES[mix]
    losses = train(tmp_path, world_size, data_flags, *initial_weights, *flags.split(), iterations=6)
    assert largest_difference(losses, reference_losses) < FP32_TOLERANCE


@pytest.fixture(scope="module")
def bf16_reference(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str], initial_weights: list[str]
) -> list[float]:
    return train(tmp_path_factory.mktemp("bf16"), 1, data_flags, *initial_weights, "--bf16", iterations=4)


@pytest.mark.parametrize("mix", BF16_MIXES)
def test_bf16_losses_equal_the_single_process(
    mix: str, tmp_path: Path, data_flags: list[str], initial_weights: list[str], bf16_reference: list[float]
) -> None:
    world_size, flags = MIXES[mix]
    losses = train(tmp_path, world_size, data_flags, *initial_weights, "--bf16", *flags.split(), iterations=4)
    assert largest_difference(losses, bf16_reference) < BF16_TOLERANCE


def test_training_learns(reference_losses: list[float]) -> None:
    """Equality of runs that learn nothing would show nothing."""
    assert reference_losses[-1] < reference_losses[0] - 0.05


def test_another_seed_gives_other_losses(
    tmp_path: Path, data_flags: list[str], initial_weights: list[str], reference_losses: list[float]
) -> None:
    """The tolerance can fail: other data order, same weights."""
    losses = train(tmp_path, 1, data_flags, *initial_weights, "--seed", "4321", iterations=6)
    assert largest_difference(losses, reference_losses) > 1e-3
