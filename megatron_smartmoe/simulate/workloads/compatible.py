"""W0 to W7 of NVIDIA/Megatron-LM pull request 7488 (benchmarks/moe/token_imbalance), written from their definitions.

A step's tokens are the same on every source rank, so a rank's load is the sum of its experts' counts times the number
of ranks. W1 and W2 are one rule under two random streams; W3 has twice as many hot experts as they, hence half the heat
of each; W4 is uniform, with the same number of tokens on all sources; W6 stands still in its first three steps and W7
is uniform in them. The corrected series (`corrected.py`) is the answer to that; this one is kept as it is, so that
numbers can be compared.

The pull request's README reports 1.281 and 0.159 for W3 (8 experts, top-2, 128 tokens), which its own code does not
give: 1.906 and 0.732. All other numbers of that table agree to three digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.simulate.workloads.torch_stream import TorchStream
from megatron_smartmoe.spec.arrays import IntArray

SEED = 1234
_ALL_EVERY = 4  # every fourth token of a workload with a hot set may go to any expert
_ROTATION, _BURST = 3, 4  # steps


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """E experts, K of them a token, T tokens of a source rank in a step."""

    num_experts: int
    top_k: int
    tokens: int

    @property
    def hot(self) -> int:
        """Experts of the hot set."""
        return max(self.top_k, self.num_experts // 4)


def _hot_set(sizes: Sizes, step: int, token: int) -> IntArray:
    every = token % _ALL_EVERY == 0
    return np.arange(sizes.num_experts if every else sizes.hot)


def _spread(sizes: Sizes, step: int, token: int) -> IntArray:
    even = np.unique(2 * np.arange(max(sizes.top_k, sizes.num_experts // 2)) % sizes.num_experts)
    every = token % _ALL_EVERY == 0 or len(even) < sizes.top_k
    return np.arange(sizes.num_experts) if every else even


def _uniform(sizes: Sizes, step: int, token: int) -> IntArray:
    return np.arange(sizes.num_experts)


def _upper_half(sizes: Sizes, step: int, token: int) -> IntArray:
    return np.arange(sizes.num_experts // 2, sizes.num_experts)


def _rotating(sizes: Sizes, step: int, token: int) -> IntArray:
    if token % _ALL_EVERY == 0:
        return np.arange(sizes.num_experts)
    return ((step // _ROTATION) * sizes.hot + np.arange(sizes.hot)) % sizes.num_experts


def _burst(sizes: Sizes, step: int, token: int) -> IntArray:
    is_hot = step % _BURST == _BURST - 1 and token % 2 == 0
    return np.arange(sizes.hot if is_hot else sizes.num_experts)


# The experts that a token chooses from, by step and number of the token; None: no draw.
POOLS: dict[str, Callable[[Sizes, int, int], IntArray] | None] = {
    "W0_balanced": None,
    "W1_hot_expert_set": _hot_set,
    "W2_hot_rank": _hot_set,
    "W3_spread_hot_experts": _spread,
    "W4_source_ragged": _uniform,
    "W5_zero_expert_rank": _upper_half,
    "W6_rotating_hotspot": _rotating,
    "W7_burst": _burst,
}


def rows(name: str, sizes: Sizes, step: int, seed: int = SEED) -> tuple[IntArray, NDArray[np.float32]]:
    """Experts and gates of the tokens of one step.

    Returns:
        Experts `[T, K]`, distinct in each row, and gates `[T, K]` that sum to one.
    """
    text = f"{name}|{seed}|{step}"
    stream = TorchStream(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
    shape = (sizes.tokens, sizes.top_k)
    pool_of = POOLS[name]
    if pool_of is None:
        experts_TK = np.arange(sizes.tokens * sizes.top_k).reshape(shape) % sizes.num_experts
    else:
        pools = [pool_of(sizes, step, token) for token in range(sizes.tokens)]
        drawn_TK = stream.permutations([len(pool) for pool in pools], sizes.top_k)
        experts_TK = np.sort([pool[drawn] for pool, drawn in zip(pools, drawn_TK, strict=True)], axis=1)
    gates_TK = stream.uniform(shape) * np.float32(0.5) + np.float32(0.5)
    return experts_TK, gates_TK / gates_TK.sum(axis=1, keepdims=True)


def counts(name: str, sizes: Sizes, step: int, seed: int = SEED) -> IntArray:
    """Tokens of one source rank for each expert, `[E]`."""
    experts_TK, _ = rows(name, sizes, step, seed)
    return np.bincount(experts_TK.ravel(), minlength=sizes.num_experts)


def fingerprint(name: str, sizes: Sizes, *, steps: int, ep: int, seed: int = SEED) -> str:
    """16 hexadecimal digits of all tokens and gates, by the pull request's recipe."""
    head = f"{name}|{sizes.num_experts}|{sizes.top_k}|{sizes.tokens}|{steps}|{seed}|{ep}"
    digest = hashlib.sha256(head.encode())
    for step in range(steps):
        experts_TK, gates_TK = rows(name, sizes, step, seed)
        digest.update(experts_TK.astype("<i8").tobytes())
        digest.update(gates_TK.astype("<f4").tobytes())
    return digest.hexdigest()[:16]
