"""What `cost.hierarchical` is compared with: copies of a token that cross nodes when it is sent once per node.

Method. A token has K experts of E, on R ranks of N nodes. Sent K times it makes K (1 - 1/N) crossings. Sent once per
node that holds any of its experts, and from there over the faster links to each rank that does, it makes
D(N) (1 - 1/N), where D(G) is the mean number of distinct groups among G equal groups of experts:

    D(G) = G (1 - C(E - E/G, K) / C(E, K))

for K different experts drawn with equal chances (a group is missed when all K lie outside it: hypergeometric). The
links inside the node carry D(R) then. Both kinds of link work at the same time, so an exchange takes as long as the
slower of the two.

Where experts have different loads, a token's experts are taken as drawn one by one with each expert's share as its
chance, given that K are drawn (conditional Poisson sampling, Hajek 1964). With equal loads that is D(G) again.

Alternatives: K (1 - 1/N) overstates the crossings by a factor of 4 at E 256, K 8 and 2 nodes; counting them in the
routing itself is exact, but needs the tokens' choices, which no trace of counts has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray

_ALMOST_ONE = 1 - 1e-9  # a chance of 1 has no odds
_LARGEST_ODDS = 1e9
_ROUNDS = 8  # leave less than 0.1% of a chance


@dataclass(frozen=True, kw_only=True)
class CopiesPerToken:
    """Mean copies of one token in a dispatch (a combine mirrors it).

    Attributes:
        experts: K, assignments.
        ranks: distinct ranks that hold one of its experts, its own included.
        nodes: distinct nodes that do, its own included.
        crossing: copies that leave the node when it is sent once per expert.
        crossing_once_per_rank: those when it is sent once per rank.
        crossing_once_per_node: those when it is sent once per node.
    """

    experts: int
    ranks: float
    nodes: float
    crossing: float
    crossing_once_per_rank: float
    crossing_once_per_node: float


def distinct_groups(num_experts: int, top_k: int, num_groups: int, allowed_groups: int | None = None) -> float:
    """Mean number of equal groups of experts (nodes, ranks) that hold at least one of a token's experts.

    Args:
        num_experts: E.
        top_k: K different experts, all equally likely.
        num_groups: G, which divides E.
        allowed_groups: a token's experts are in at most so many groups (group-limited routing), any of them equally
            likely; None for all.
    """
    allowed = num_groups if allowed_groups is None else min(allowed_groups, num_groups)
    per_group = num_experts // num_groups
    experts = allowed * per_group
    missed = math.comb(experts - per_group, top_k) / math.comb(experts, top_k)
    return allowed * (1.0 - missed)


def copies_per_token(
    num_experts: int, top_k: int, num_ranks: int, num_nodes: int, allowed_nodes: int | None = None
) -> CopiesPerToken:
    """Copies of a token, all experts equally likely.

    Args:
        num_experts: E.
        top_k: K.
        num_ranks: R, which divides E.
        num_nodes: N, which divides R.
        allowed_nodes: nodes that group-limited routing leaves to a token, while every node holds one whole group.
    """
    allowed = num_nodes if allowed_nodes is None else min(allowed_nodes, num_nodes)
    ranks = distinct_groups(num_experts * allowed // num_nodes, top_k, num_ranks * allowed // num_nodes)
    nodes = distinct_groups(num_experts, top_k, num_nodes, allowed)
    leaves = 1 - 1 / num_nodes
    return CopiesPerToken(
        experts=top_k,
        ranks=ranks,
        nodes=nodes,
        crossing=top_k * leaves,
        crossing_once_per_rank=ranks * leaves,
        crossing_once_per_node=nodes * leaves,
    )


def tokens_by_group(counts_RE: IntArray | FloatArray, group_E: IntArray, num_groups: int, top_k: int) -> FloatArray:
    """Tokens of source rank r with at least one expert in group g, `[R, G]`, estimated from the counts.

    Args:
        counts_RE: assignments of source rank r to expert e.
        group_E: group of each expert: the node of its home, for example.
        num_groups: G.
        top_k: K, assignments of a token.
    """
    counts_RE = np.asarray(counts_RE, dtype=np.float64)
    tokens_R = counts_RE.sum(axis=1) / top_k
    # Step 1: the chances with which experts would have to be drawn for themselves, so that of K drawn ones each is
    # among them as often as it was counted.
    chance_RE = _drawn_alone(counts_RE / np.maximum(tokens_R, 1e-300)[:, None], top_k)
    drawn_R = _drawn_before(chance_RE, top_k)[-1, :, top_k]
    # Step 2: a group is missed when all K are drawn outside it.
    found_RG = np.empty((len(counts_RE), num_groups))
    for group in range(num_groups):
        outside_RE = np.where(group_E == group, 0.0, chance_RE)
        none_inside_R = np.prod(np.where(group_E == group, 1 - chance_RE, 1.0), axis=1)
        missed_R = none_inside_R * _drawn_before(outside_RE, top_k)[-1, :, top_k] / np.maximum(drawn_R, 1e-300)
        found_RG[:, group] = tokens_R * (1 - missed_R)
    return found_RG


def _drawn_alone(wanted_RE: FloatArray, top_k: int) -> FloatArray:
    """Chances of experts drawn each for itself that give the wanted ones once exactly K are drawn, `[R, E]`.

    Every odds is scaled by how far its expert's chance is off, again and again (Chen, Dempster, Liu 1994).
    """
    wanted_RE = np.minimum(wanted_RE, _ALMOST_ONE)
    odds_RE = wanted_RE / (1 - wanted_RE)
    for _ in range(_ROUNDS):
        chance_RE = odds_RE / (1 + odds_RE)
        before_ERK = _drawn_before(chance_RE, top_k)
        after_ERK = _drawn_before(chance_RE[:, ::-1], top_k)[::-1]
        # Expert e is among the K drawn: it is, and K - 1 of the others.
        others_RE = np.einsum("erk,erk->re", before_ERK[:-1, :, :top_k], after_ERK[1:, :, top_k - 1 :: -1])
        found_RE = chance_RE * others_RE / np.maximum(before_ERK[-1, :, top_k], 1e-300)[:, None]
        odds_RE = np.minimum(odds_RE * wanted_RE / np.maximum(found_RE, 1e-300), _LARGEST_ODDS)
    return np.asarray(odds_RE / (1 + odds_RE))


def _drawn_before(chance_RE: FloatArray, top_k: int) -> FloatArray:
    """`[E + 1, R, K + 1]`: chance that k of the experts before e are drawn, each for itself (Poisson binomial)."""
    num_ranks, num_experts = chance_RE.shape
    drawn_ERK = np.zeros((num_experts + 1, num_ranks, top_k + 1))
    drawn_ERK[0, :, 0] = 1.0
    for expert, chance_R in enumerate(chance_RE.T):
        drawn_ERK[expert + 1] = drawn_ERK[expert] * (1 - chance_R)[:, None]
        drawn_ERK[expert + 1, :, 1:] += drawn_ERK[expert, :, :-1] * chance_R[:, None]
    return drawn_ERK


def exchange_once_per_node_s(
    tokens: float, token_bytes: float, copies: CopiesPerToken, *, intra_bytes_s: float, inter_bytes_s: float
) -> float:
    """Seconds of one exchange (a dispatch or a combine) of a rank's tokens, each sent once per node, without latency.

    Args:
        tokens: of the rank.
        token_bytes: of one copy.
        copies: of a token.
        intra_bytes_s: bandwidth that a GPU reaches inside the node.
        inter_bytes_s: bandwidth that it reaches between nodes.
    """
    between_s = copies.crossing_once_per_node / inter_bytes_s
    inside_s = copies.ranks / intra_bytes_s
    return tokens * token_bytes * max(between_s, inside_s)
