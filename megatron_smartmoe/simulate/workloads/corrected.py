"""The corrected series: what a workload of token imbalance has to tell apart.

Every workload is a set of knobs (`Knobs`): how uneven the experts are (`heat`), which experts those are (`placement`),
whether source ranks differ (`ragged`, `affinity`), and how it changes (`turn_every`, `burst_every`, `drift`). Heat and
placement are apart: `C1_hot_contiguous`, `C2_hot_strided` and `C3_hot_random` choose the same tokens and differ in the
numbers of the hot experts alone, so that what placement can do is the difference between them.

Sampling. A token's K experts are drawn with given inclusion probabilities p that sum to K: with u uniform in [0, 1), it
takes the experts in whose stretch of the running sum of p the points u, u + 1, ..., u + K - 1 lie (systematic sampling
with probabilities proportional to size: W. G. Madow, "On the theory of systematic sampling II", 1949). The experts
are distinct since no p is above 1, every expert's expected load is p T, and one random number a token is enough. The
order of the experts is drawn anew for every rank and micro-batch, so that neighbours are no pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray

Placed = Literal["contiguous", "strided", "random"]
_BISECTIONS = 60
_MOST_EXPONENT = 16.0
_LEAST_TOKENS = 1 / 16  # of T: what a ragged source has at least


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a workload is made of.

    Attributes:
        heat: share of the assignments that go to the hot set, an eighth of the experts; 0 for no hot set.
        placement: which experts are hot: the first ones, every (E / hot)-th one, or random ones.
        sigma: of the logarithms of the experts' popularities (lognormal); 0 for equal ones.
        rank_overload: max / mean tokens per rank that popularities are chosen for, with experts in the order of
            their numbers on the ranks; 0 for none. Popularity falls with the rank's number to a power, which is found
            by bisection (the form of UltraEP's generator, tests/utils.py).
        idle: share of the experts, the last ones, that no token chooses.
        ragged: whether sources have different numbers of tokens: a Gaussian about T/2, as UltraEP's.
        affinity: share of a source's assignments that go to experts of its own choice, others for every source.
        turn_every: steps after which the hot set moves on by its size; 0 for never.
        burst_every: the last of so many steps is hot, the others are uniform; 0 for no bursts.
        drift: standard deviation, by step, of the random walk of the logarithms of popularities.
    """

    heat: float = 0.0
    placement: Placed = "contiguous"
    sigma: float = 0.0
    rank_overload: float = 0.0
    idle: float = 0.0
    ragged: bool = False
    affinity: float = 0.0
    turn_every: int = 0
    burst_every: int = 0
    drift: float = 0.0


WORKLOADS: dict[str, Knobs] = {
    "C0_balanced": Knobs(),
    "C1_hot_contiguous": Knobs(heat=0.4),
    "C2_hot_strided": Knobs(heat=0.4, placement="strided"),
    "C3_hot_random": Knobs(heat=0.4, placement="random"),
    "C4_lognormal": Knobs(sigma=1.0),
    "C5_rank_overload_2": Knobs(rank_overload=2.0),
    "C6_idle_experts": Knobs(idle=0.5),
    "C7_ragged_sources": Knobs(sigma=1.0, ragged=True),
    "C8_source_affinity": Knobs(affinity=0.5),
    "C9_rotating": Knobs(heat=0.4, turn_every=3),
    "C10_burst": Knobs(heat=0.4, burst_every=4),
    "C11_drift": Knobs(sigma=1.0, drift=0.1),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """E experts, K of them a token, T tokens of a source rank in a micro-batch, R ranks, M micro-batches a step."""

    num_experts: int
    top_k: int
    tokens: int
    num_ranks: int
    micro_batches: int

    @property
    def hot(self) -> int:
        """Experts of the hot set."""
        return max(1, self.num_experts // 8)


def counts(name: str, shape: Shape, steps: int, seed: int) -> IntArray:
    """Tokens by step, source rank, micro-batch and expert, `[N, R, M, E]`; those of a step do not depend on `steps`."""
    knobs = WORKLOADS[name]
    found = np.empty((steps, shape.num_ranks, shape.micro_batches, shape.num_experts), dtype=np.int64)
    # Seeds name what differs between workloads only where it should: the three placements of a hot set share draws.
    popularity_E = _popularity(knobs, shape, _rng(seed, "popularity"))
    walk = _rng(seed, "walk")
    sizes_R = _source_tokens(knobs, shape, _rng(seed, "sources"))
    for step in range(steps):
        if knobs.drift and step:
            popularity_E = popularity_E * np.exp(knobs.drift * walk.standard_normal(shape.num_experts))
        is_hot = not knobs.burst_every or step % knobs.burst_every == knobs.burst_every - 1
        chance_E = inclusion(popularity_E if is_hot else np.ones(shape.num_experts), shape.top_k)
        order_E = _numbers(knobs, shape, step, seed)
        for rank in range(shape.num_ranks):
            own_E = _with_affinity(chance_E, knobs, shape, _rng(seed, f"affinity {rank}"))
            for micro in range(shape.micro_batches):
                drawn_E = _draw(own_E, int(sizes_R[rank]), shape.top_k, _rng(seed, f"tokens {step} {rank} {micro}"))
                found[step, rank, micro, order_E] = drawn_E
    return found


def inclusion(popularity_E: FloatArray, top_k: int) -> FloatArray:
    """Probabilities that sum to K, none above 1, otherwise proportional to popularity.

    Raises:
        ValueError: fewer than K experts have a popularity above zero.
    """
    if (popularity_E > 0).sum() < top_k:
        raise ValueError(f"{int((popularity_E > 0).sum())} experts cannot take {top_k} assignments of a token")
    chance_E = np.zeros(len(popularity_E))
    is_open_E = popularity_E > 0
    while True:  # those that would be above 1 are set to 1, and the others share the rest
        left = top_k - int((chance_E == 1).sum())
        share_E = left * popularity_E / popularity_E[is_open_E].sum() if is_open_E.any() else chance_E
        over_E = is_open_E & (share_E >= 1)
        if not over_E.any():
            return np.where(is_open_E, share_E, chance_E)
        chance_E[over_E], is_open_E = 1.0, is_open_E & ~over_E


def fingerprint(counts_NRME: IntArray) -> str:
    """16 hexadecimal digits of the counts alone: the same in every layout that dispatches these tokens."""
    shape = f"{counts_NRME.shape}".encode()
    return hashlib.sha256(shape + counts_NRME.astype("<u4").tobytes()).hexdigest()[:16]


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int(hashlib.sha256(f"{seed}|{purpose}".encode()).hexdigest()[:16], 16)))


def _popularity(knobs: Knobs, shape: Shape, rng: np.random.Generator) -> FloatArray:
    """Of the experts in the order of their popularity's origin, before `_numbers` places them."""
    popularity_E = np.exp(knobs.sigma * rng.standard_normal(shape.num_experts))
    if knobs.heat:
        popularity_E[: shape.hot] = knobs.heat / shape.hot
        popularity_E[shape.hot :] = (1 - knobs.heat) / (shape.num_experts - shape.hot)
    if knobs.idle:
        popularity_E[shape.num_experts - int(knobs.idle * shape.num_experts) :] = 0.0
    if knobs.rank_overload:
        popularity_E = _overloaded(knobs.rank_overload, shape)
    return popularity_E


def _overloaded(target: float, shape: Shape) -> FloatArray:
    """Popularities of which the first rank has `target` times the mean load, as near as they come."""
    rank_E = 1 + np.arange(shape.num_experts) * shape.num_ranks // shape.num_experts
    low, high = 0.0, _MOST_EXPONENT
    for _ in range(_BISECTIONS):
        exponent = (low + high) / 2
        chance_E = inclusion(np.power(1.0 * rank_E, -exponent), shape.top_k)
        first = chance_E[rank_E == 1].sum() * shape.num_ranks / shape.top_k
        low, high = (exponent, high) if first < target else (low, exponent)
    return np.asarray(rank_E**-low, dtype=np.float64)


def _source_tokens(knobs: Knobs, shape: Shape, rng: np.random.Generator) -> IntArray:
    """Tokens of each source rank in a micro-batch."""
    if not knobs.ragged:
        return np.full(shape.num_ranks, shape.tokens)
    share_R = np.clip(rng.normal(0.5, 0.35, shape.num_ranks), _LEAST_TOKENS, 1.0)
    return np.maximum(1, np.rint(share_R * shape.tokens)).astype(np.int64)


def _with_affinity(chance_E: FloatArray, knobs: Knobs, shape: Shape, rng: np.random.Generator) -> FloatArray:
    """Probabilities of one source: a part of its assignments go to a hot set of its own."""
    if not knobs.affinity:
        return chance_E
    own_E = np.zeros(shape.num_experts)
    own_E[rng.permutation(shape.num_experts)[: max(shape.hot, shape.top_k)]] = 1.0
    mixed_E = (1 - knobs.affinity) * chance_E + knobs.affinity * inclusion(own_E, shape.top_k)
    return inclusion(mixed_E, shape.top_k)


def _numbers(knobs: Knobs, shape: Shape, step: int, seed: int) -> IntArray:
    """Which expert is the i-th of the draw: the identity but for hot sets that lie elsewhere or move."""
    experts = shape.num_experts
    numbers_E = np.arange(experts)
    if knobs.heat and knobs.placement == "strided":
        hot_H = np.arange(shape.hot) * (experts // shape.hot)
        numbers_E = np.concatenate([hot_H, np.setdiff1d(numbers_E, hot_H)])
    elif knobs.heat and knobs.placement == "random":
        numbers_E = _rng(seed, "placement").permutation(experts)
    if knobs.turn_every:
        numbers_E = (numbers_E + step // knobs.turn_every * shape.hot) % experts
    return numbers_E


def _draw(chance_E: FloatArray, tokens: int, top_k: int, rng: np.random.Generator) -> IntArray:
    """How many of the tokens choose each expert; see the module."""
    order_E = rng.permutation(len(chance_E))
    ends_E = np.cumsum(chance_E[order_E])
    ends_E *= top_k / ends_E[-1]  # so that rounding leaves no point beyond the last expert
    points_TK = rng.random(tokens)[:, None] + np.arange(top_k)
    at_TK = np.minimum(np.searchsorted(ends_E, points_TK, side="right"), len(chance_E) - 1)
    found_E = np.zeros(len(chance_E), dtype=np.int64)
    found_E[order_E] = np.bincount(at_TK.ravel(), minlength=len(chance_E))
    return found_E
