"""Made workloads: the compatible ones have the published numbers, the corrected ones what their knobs say."""

import numpy as np
import pytest
import torch

from megatron_smartmoe.simulate.workloads import compatible, corrected
from megatron_smartmoe.simulate.workloads.torch_stream import TorchStream

README = compatible.Sizes(num_experts=8, top_k=2, tokens=128)
README_K4 = compatible.Sizes(num_experts=8, top_k=4, tokens=512)

# Fingerprints of one and of eight steps at EP 4, then max / mean and the coefficient of variation of the tokens per
# expert (pull request 7488's README; W3 as its code gives it), then max / mean by rank.
PUBLISHED = {
    "W0_balanced": ("a06b52cbd5e431be", "58a820fba7120a91", 1.000, 0.000, 1.000),
    "W1_hot_expert_set": ("d2258acb91382412", "c1fa85e6cd8257e7", 3.312, 1.309, 3.266),
    "W2_hot_rank": ("d16ba56c1376521f", "8e8a32e14ebbe476", 3.219, 1.272, 3.203),
    "W3_spread_hot_experts": ("f1cb2abc5f4f295c", "7e29d2e1e0415cc9", 1.906, 0.732, 1.125),
    "W4_source_ragged": ("1d1ee3d9ad3b4f4c", "8461d5ab893fbfa7", 1.281, 0.141, 1.172),
    "W5_zero_expert_rank": ("62313ebdc407765a", "e870f411da09b7d9", 2.156, 1.007, 2.109),
    "W6_rotating_hotspot": ("70c05ebe7773c3e7", "c3bcff5ac9c2906a", 3.312, 1.319, 3.281),
    "W7_burst": ("a2e321022107f68d", "07c5308d239b38df", 1.219, 0.126, 1.047),
}
# The README's second table, top-4 of 512 tokens, without W3.
PUBLISHED_K4 = {
    "W1_hot_expert_set": (1.781, 0.744),
    "W2_hot_rank": (1.770, 0.747),
    "W4_source_ragged": (1.086, 0.046),
    "W5_zero_expert_rank": (2.000, 1.000),
    "W6_rotating_hotspot": (1.770, 0.742),
    "W7_burst": (1.066, 0.040),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_compatible_workloads_are_the_published_ones(name: str) -> None:
    one, eight, imbalance, variation, rank_imbalance = PUBLISHED[name]
    assert compatible.fingerprint(name, README, steps=1, ep=4) == one
    assert compatible.fingerprint(name, README, steps=8, ep=4) == eight
    load_E = compatible.counts(name, README, 0)
    load_R = load_E.reshape(4, 2).sum(axis=1)
    assert load_E.max() / load_E.mean() == pytest.approx(imbalance, abs=6e-4)
    assert load_E.std() / load_E.mean() == pytest.approx(variation, abs=6e-4)
    assert load_R.max() / load_R.mean() == pytest.approx(rank_imbalance, abs=6e-4)


@pytest.mark.parametrize("name", PUBLISHED_K4)
def test_compatible_workloads_at_the_second_published_size(name: str) -> None:
    imbalance, variation = PUBLISHED_K4[name]
    load_E = compatible.counts(name, README_K4, 0)
    assert load_E.max() / load_E.mean() == pytest.approx(imbalance, abs=6e-4)
    assert load_E.std() / load_E.mean() == pytest.approx(variation, abs=6e-4)


def test_rows_are_routings() -> None:
    for name in compatible.POOLS:
        experts_TK, gates_TK = compatible.rows(name, README, 3)
        assert all(len(set(row)) == README.top_k for row in experts_TK.tolist())
        assert gates_TK.dtype == np.float32
        assert gates_TK.sum(axis=1) == pytest.approx(np.ones(README.tokens))


def test_the_stream_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(20_26)
    lengths = [8, 3, 8, 1, 5]
    permutations = [torch.randperm(length, generator=generator).tolist() for length in lengths]
    uniform = torch.rand(3, 2, generator=generator)
    stream = TorchStream(20_26)
    assert stream.permutations(lengths, 1)[:, 0].tolist() == [order[0] for order in permutations]
    assert stream.uniform((3, 2)).tolist() == uniform.tolist()
    # All entries of permutations of one length, to the last.
    generator.manual_seed(7)
    found = [torch.randperm(6, generator=generator).tolist() for _ in range(4)]
    assert TorchStream(7).permutations([6] * 4, 6).tolist() == found


SHAPE = corrected.Shape(num_experts=32, top_k=4, tokens=2000, num_ranks=4, micro_batches=2)


def drawn(name: str, steps: int = 4, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens by step and expert, and by step and rank."""
    load_NE = corrected.counts(name, SHAPE, steps, seed).sum(axis=(1, 2))
    return load_NE, load_NE.reshape(steps, SHAPE.num_ranks, -1).sum(axis=2)


def overload(load: np.ndarray) -> list[float]:
    return list(load.max(axis=1) / load.mean(axis=1))


@pytest.mark.parametrize("name", corrected.WORKLOADS)
def test_every_token_has_different_experts(name: str) -> None:
    counts_NRME = corrected.counts(name, SHAPE, 3, seed=5)
    tokens_NRM = counts_NRME.sum(axis=3)
    assert (tokens_NRM % SHAPE.top_k == 0).all()
    assert (counts_NRME.max(axis=3) <= tokens_NRM // SHAPE.top_k).all()
    # A longer series begins with the same steps, so that a run may be continued.
    assert np.array_equal(counts_NRME, corrected.counts(name, SHAPE, 5, seed=5)[:3])
    assert not np.array_equal(counts_NRME, corrected.counts(name, SHAPE, 3, seed=6))
    if corrected.WORKLOADS[name] != corrected.Knobs(idle=0.5):
        assert corrected.counts(name, SHAPE, 1, seed=5).any(axis=(0, 1, 2)).all()


def test_heat_and_placement_are_apart() -> None:
    # Four hot experts of 32 take 0.4 of the assignments: 0.1 each, 3.2 times the mean, in all three placements alike.
    sorted_loads, ranks = [], {}
    for name in ("C1_hot_contiguous", "C2_hot_strided", "C3_hot_random"):
        load_NE, load_NR = drawn(name)
        sorted_loads.append(np.sort(load_NE, axis=1))
        ranks[name] = overload(load_NR)
    assert all(np.array_equal(sorted_loads[0], other) for other in sorted_loads[1:])
    assert overload(sorted_loads[0]) == pytest.approx([3.2] * 4, rel=0.05)
    # On four ranks of eight experts: all hot ones on rank 0, which has 0.4 + 4 * 0.6 / 28 of the load; or one on each.
    assert ranks["C1_hot_contiguous"] == pytest.approx([4 * (0.4 + 4 * 0.6 / 28)] * 4, rel=0.02)
    assert ranks["C2_hot_strided"] == pytest.approx([1.0] * 4, abs=0.02)


def test_a_rank_has_the_load_that_is_asked_for() -> None:
    assert overload(drawn("C5_rank_overload_2")[1]) == pytest.approx([2.0] * 4, rel=0.02)


def test_idle_experts_have_no_tokens() -> None:
    load_NE, _ = drawn("C6_idle_experts")
    assert not load_NE[:, 16:].any()
    assert load_NE[:, :16].all()


def test_sources_differ_where_they_should() -> None:
    ragged_NRME = corrected.counts("C7_ragged_sources", SHAPE, 2, seed=1)
    sent_R = ragged_NRME.sum(axis=(0, 2, 3))
    assert sent_R.max() > 1.2 * sent_R.min()
    for name, differs in (("C0_balanced", False), ("C8_source_affinity", True)):
        hottest_R = corrected.counts(name, SHAPE, 2, seed=1).sum(axis=(0, 2)).max(axis=1)
        mean = 2 * SHAPE.micro_batches * SHAPE.tokens * SHAPE.top_k / SHAPE.num_experts
        assert (hottest_R.min() > 2 * mean) == differs


def test_hot_spots_move_and_bursts_happen() -> None:
    hottest_N = drawn("C9_rotating", steps=7)[0].argmax(axis=1) // SHAPE.hot
    assert hottest_N.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert [value > 2 for value in overload(drawn("C10_burst", steps=8)[0])] == [False, False, False, True] * 2
    before, after = drawn("C11_drift", steps=40)[0][[0, -1]]
    assert np.abs(before - after).sum() / 2 > 0.1 * before.sum()


def test_inclusion_has_no_probability_above_one() -> None:
    # 12 : 2 : 1 : 1 with two a token: the first is certain, the others share the second place.
    assert corrected.inclusion(np.array([12.0, 2.0, 1.0, 1.0]), 2) == pytest.approx([1, 0.5, 0.25, 0.25])
    assert corrected.inclusion(np.array([1.0, 1.0, 0.0]), 2) == pytest.approx([1, 1, 0])
    with pytest.raises(ValueError, match="cannot take 2"):
        corrected.inclusion(np.array([1.0, 0.0]), 2)


def test_fingerprints_do_not_know_the_layout() -> None:
    counts_NRME = corrected.counts("C4_lognormal", SHAPE, 2, seed=1)
    assert corrected.fingerprint(counts_NRME) == corrected.fingerprint(counts_NRME.astype(np.int32))
    assert corrected.fingerprint(counts_NRME) != corrected.fingerprint(counts_NRME + 1)
