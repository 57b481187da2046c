"""The auction finds what scipy's exact solver finds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from megatron_smartmoe.adapter.gates.auction import balanced_assignment, rounded


def best_total(scores_TE: np.ndarray) -> int:
    """The largest total of the rounded scores, with every expert as often as it has places."""
    places_TT = np.repeat(rounded(scores_TE), scores_TE.shape[0] // scores_TE.shape[1], axis=1)
    rows, columns = linear_sum_assignment(places_TT, maximize=True)
    return int(places_TT[rows, columns].sum())


def total(scores_TE: np.ndarray, expert_T: np.ndarray) -> int:
    return int(rounded(scores_TE)[np.arange(len(expert_T)), expert_T].sum())


def drawn(kind: str, num_tokens: int, num_experts: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scores_TE = generator.normal(size=(num_tokens, num_experts))
    if kind == "skewed":
        scores_TE += 3 * generator.normal(size=num_experts)
    elif kind == "alike":  # tokens that want the same experts in the same order
        scores_TE = generator.normal(size=(num_tokens, 2)) @ generator.normal(size=(2, num_experts))
    elif kind == "ties":
        scores_TE = scores_TE.round()
    elif kind == "equal":
        scores_TE[:] = 1.0
    return scores_TE.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "skewed", "alike", "ties", "equal"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(4, 2), (8, 8), (48, 6), (128, 16), (6, 1)])
def test_its_total_is_the_best_one(kind: str, num_tokens: int, num_experts: int) -> None:
    for seed in range(3):
        scores_TE = drawn(kind, num_tokens, num_experts, seed)
        expert_T = balanced_assignment(scores_TE)
        assert np.bincount(expert_T, minlength=num_experts).tolist() == [num_tokens // num_experts] * num_experts
        assert total(scores_TE, expert_T) == best_total(scores_TE)


def test_by_hand() -> None:
    """Both want expert 0, and the second one loses less by leaving it: 5 + 3 is more than 1 + 4."""
    assert balanced_assignment(np.array([[5.0, 1.0], [4.0, 3.0]])).tolist() == [0, 1]


def test_taking_the_best_in_turn_is_not_enough() -> None:
    """The comparison can fail."""
    scores_TE = drawn("alike", 48, 6, 0)
    room_E, expert_T = np.full(6, 8), np.zeros(48, dtype=np.int64)
    for token in range(48):
        expert_T[token] = np.where(room_E > 0, scores_TE[token], -np.inf).argmax()
        room_E[expert_T[token]] -= 1
    assert total(scores_TE, expert_T) < best_total(scores_TE)
