"""Megatron's flags reach Megatron: variants of model, router and schedule train through the entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.test_parallel_equality import FP32_TOLERANCE, MIXES, largest_difference
from tests.support.training import INITIAL_WEIGHTS, train

pytestmark = pytest.mark.dist

EP2 = "--expert-model-parallel-size 2".split()
# Other ways to the same numbers.
SAME_LOSSES = {
    "allgather dispatcher": "--moe-token-dispatcher-type allgather",
    "Megatron's own attention": "--attention-backend unfused",
    "selective recompute": "--recompute-granularity selective --recompute-modules moe",
}
VARIANTS = {
    "multi-latent attention": "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 16",
    "multi-token prediction": "--mtp-num-layers 1",
    "shared expert, expert bias": "--moe-shared-expert-intermediate-size 64 --moe-router-enable-expert-bias "
    "--moe-router-score-function sigmoid",
    "group-limited routing": "--moe-router-num-groups 4 --moe-router-group-topk 2",
    "capacity": "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
    "grouped-query attention": "--group-query-attention --num-query-groups 2 --qk-layernorm",
    "dense first layer": "--moe-layer-freq ([0]*1+[1]*3)",
}
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()


@pytest.mark.parametrize("way", SAME_LOSSES)
def test_same_losses(
    way: str, tmp_path: Path, data_flags: list[str], initial_weights: list[str], reference_losses: list[float]
) -> None:
    losses = train(tmp_path, 2, data_flags, *initial_weights, *EP2, *SAME_LOSSES[way].split(), iterations=6)
    assert largest_difference(losses, reference_losses) < FP32_TOLERANCE


def test_prediction_blocks_train_the_same_model(tmp_path: Path) -> None:
    """Under tensor parallelism their norms must be marked, and latent attention wants a core of its own shapes."""
    flags = [*VARIANTS["multi-token prediction"].split(), *VARIANTS["multi-latent attention"].split()]
    weights = tmp_path / "weights"
    train(tmp_path / "first", 1, MOCK_DATA, *flags, "--save", str(weights), "--save-interval", "1", iterations=1)
    flags += ["--load", str(weights), *INITIAL_WEIGHTS]
    reference = train(tmp_path / "one", 1, MOCK_DATA, *flags, iterations=4)
    for mix in ("TP2+SP", "PP2"):
        world_size, mix_flags = MIXES[mix]
        losses = train(tmp_path / mix, world_size, MOCK_DATA, *flags, *mix_flags.split(), iterations=4)
        assert largest_difference(losses, reference) < FP32_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn(variant: str, tmp_path: Path) -> None:
    losses = train(tmp_path, 2, MOCK_DATA, *EP2, *VARIANTS[variant].split(), iterations=4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2
