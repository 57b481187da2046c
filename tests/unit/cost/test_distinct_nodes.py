"""Tokens sent once per node: the closed formula, drawn routing, and published measurements."""

import itertools

import numpy as np
import pytest

from tests.support.distinct_nodes import (
    copies_per_token,
    distinct_groups,
    exchange_once_per_node_s,
    tokens_by_group,
)

# GB/s over the network as DeepEP's tests print them: bytes of distinct nodes, the own one included, over the time.
# E 256, K 8, 8 GPUs per node. H800 with 160 GB/s reached over NVLink and 400 Gb/s cards (README of version 1); B200
# with 900 GB/s NVLink and 400 Gb/s cards (version 2), where only the network limits.
DEEP_EP = [
    ("H800, EP16", 2, 160e9, 43e9),
    ("H800, EP32", 4, 160e9, 58e9),
    ("H800, EP64", 8, 160e9, 51e9),
    ("B200, EP16", 2, 900e9, 90e9),
    ("B200, EP32", 4, 900e9, 61e9),
]
REACHED = 0.88  # of either link's nominal bandwidth, in all rows


def test_every_pair_of_four_experts_by_hand() -> None:
    # E 4, K 2, two nodes of two experts: of the 6 pairs 2 lie on one node, 4 on both.
    pairs = list(itertools.combinations(range(4), 2))
    by_hand = sum(len({expert // 2 for expert in pair}) for pair in pairs) / len(pairs)
    assert distinct_groups(4, 2, 2) == pytest.approx(by_hand) == pytest.approx(10 / 6)


@pytest.mark.parametrize(("nodes", "published"), [(2, 3.27), (4, 2.01)])
def test_distinct_ranks_over_distinct_nodes_as_measured(nodes: int, published: float) -> None:
    copies = copies_per_token(256, 8, 8 * nodes, nodes)
    assert copies.ranks / copies.nodes == pytest.approx(published, abs=0.005)


def test_crossings_at_eight_nodes() -> None:
    copies = copies_per_token(256, 8, 64, 8)
    found = (copies.crossing, copies.crossing_once_per_rank, copies.crossing_once_per_node)
    assert found == pytest.approx((7.00, 6.72, 4.63), abs=0.005)
    assert copies_per_token(256, 8, 64, 8, allowed_nodes=4).crossing_once_per_node == pytest.approx(3.18, abs=0.005)
    assert copies_per_token(256, 1, 64, 8).crossing_once_per_node == pytest.approx(7 / 8)  # K 1: nothing to gain


@pytest.mark.parametrize(("name", "nodes", "nvlink_bytes_s", "published_bytes_s"), DEEP_EP)
def test_published_bandwidths(name: str, nodes: int, nvlink_bytes_s: float, published_bytes_s: float) -> None:
    copies = copies_per_token(256, 8, 8 * nodes, nodes)
    speeds = {"intra_bytes_s": REACHED * nvlink_bytes_s, "inter_bytes_s": REACHED * 50e9}
    seconds = exchange_once_per_node_s(4096, 7168, copies, **speeds)
    assert 4096 * 7168 * copies.nodes / seconds == pytest.approx(published_bytes_s, rel=0.05), name


def test_equal_loads_give_the_closed_formula() -> None:
    tokens_RG = tokens_by_group(np.full((3, 64), 96), np.arange(64) // 16, 4, 6)  # 1,024 tokens of a rank
    assert tokens_RG.shape == (3, 4)
    assert tokens_RG.sum(axis=1) == pytest.approx(1024 * distinct_groups(64, 6, 4))


def test_uneven_loads_as_drawn() -> None:
    """Top-K of noisy scores, popular experts on node 0: the estimate is within 2% of what the tokens really do."""
    rng = np.random.default_rng(3)
    scores_TE = rng.normal(0, 1, 32) + rng.gumbel(size=(20_000, 32))
    chosen_TK = np.argsort(-scores_TE, axis=1)[:, :4]
    order_E = np.argsort(-np.bincount(chosen_TK.ravel(), minlength=32))
    group_E = np.empty(32, dtype=np.int64)
    group_E[order_E] = np.arange(32) // 8
    drawn_G = [(group_E[chosen_TK] == group).any(axis=1).sum() for group in range(4)]
    counts_RE = np.bincount(chosen_TK.ravel(), minlength=32)[None]
    assert tokens_by_group(counts_RE, group_E, 4, 4)[0] == pytest.approx(drawn_G, rel=0.02)


def test_an_expert_of_every_token_is_on_its_node() -> None:
    counts_RE = np.array([[100, 60, 40, 0]])  # K 2, 100 tokens, all of which choose expert 0
    assert tokens_by_group(counts_RE, np.array([0, 0, 1, 1]), 2, 2)[0] == pytest.approx([100, 40])
