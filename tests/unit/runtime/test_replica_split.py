"""Every rank works out the same split, and every choice's row goes to a slot that holds its expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smartmoe.cost.replicas import FREE_TRANSFERS, TransferPrice
from megatron_smartmoe.ops import reference
from megatron_smartmoe.placement.exact_plan import ExactPlanOptions, cheapest_exact_plan
from megatron_smartmoe.runtime.replicas.kernels import exact_slots
from megatron_smartmoe.runtime.replicas.split import (
    BALANCED,
    homes_only,
    replicas_of,
    segment_shifts,
    shifted_rows,
    slot_of_rows,
    split_tokens,
)
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY

RANKS, EXPERTS, SPARE, HOME_SLOTS = 4, 8, 1, 2


def skewed_counts(seed: int, tokens: int = 40) -> IntArray:
    """`[R, E]`, the first expert with about a third of everything."""
    generator = np.random.default_rng(seed)
    share_E = generator.dirichlet(np.array([4.0, 1, 1, 1, 1, 1, 1, 1]))
    return generator.multinomial(tokens, share_E, size=RANKS)


def planned(counts_RE: IntArray, *, limit: float = 1.01, price_tokens: float = 0.0, num_nodes: int = 1) -> IntArray:
    price = TransferPrice.of_each(price_tokens)
    homes_RS = homes_only(EXPERTS, RANKS, SPARE)
    return exact_slots(counts_RE, homes_RS, HOME_SLOTS, num_nodes=num_nodes, limit=limit, price=price)


def moved(rows_TK: torch.Tensor, sent_RS: IntArray, slots_RS: IntArray) -> torch.Tensor:
    """The rows of a source rank after its segments have moved."""
    segments_2P = torch.from_numpy(np.stack(segment_shifts(sent_RS, slots_RS)))
    return shifted_rows(rows_TK, segments_2P, int(sent_RS.sum()))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_goes_to_a_slot_of_its_expert(seed: int) -> None:
    counts_RE = skewed_counts(seed)
    slots_RS = planned(counts_RE)
    sent_RRS = split_tokens(counts_RE, slots_RS, HOME_SLOTS)
    for expert in range(EXPERTS):
        assert (sent_RRS[:, slots_RS == expert].sum(axis=1) == counts_RE[:, expert]).all()
    assert not sent_RRS[:, slots_RS == EMPTY].any()
    alone_R = counts_RE.sum(axis=0).reshape(RANKS, -1).sum(axis=1)
    assert sent_RRS.sum(axis=(0, 2)).max() <= alone_R.max()


def test_replicas_in_plenty_balance_to_the_token() -> None:
    counts_RE = skewed_counts(0)
    slots_RS = exact_slots(
        counts_RE, homes_only(EXPERTS, RANKS, 3), HOME_SLOTS, num_nodes=1, limit=1.0, price=FREE_TRANSFERS
    )
    load_R = split_tokens(counts_RE, slots_RS, HOME_SLOTS).sum(axis=(0, 2))
    assert load_R.max() == -(-int(counts_RE.sum()) // RANKS)


def test_no_replicas_for_what_is_balanced_or_does_not_pay() -> None:
    even_RE = np.full((RANKS, EXPERTS), 5)
    assert replicas_of(planned(even_RE), HOME_SLOTS) == ()
    skewed_RE = skewed_counts(0)
    assert replicas_of(planned(skewed_RE), HOME_SLOTS)
    assert replicas_of(planned(skewed_RE, price_tokens=1000.0), HOME_SLOTS) == ()
    assert replicas_of(planned(skewed_RE, limit=4.0), HOME_SLOTS) == ()


@pytest.mark.parametrize("price_tokens", [0.0, 15.0, 1e6])
def test_the_simulator_makes_the_same_replicas(price_tokens: float) -> None:
    """The planners' function and the dispatcher's: the same limit, the same price, the same slots."""
    made = 0
    for seed in range(12):
        counts_RE = skewed_counts(seed)
        slots_RS = planned(counts_RE, price_tokens=price_tokens)
        options = ExactPlanOptions(price=TransferPrice.of_each(price_tokens), limit=BALANCED)
        again_RS = cheapest_exact_plan(counts_RE.sum(axis=0), slots_RS, HOME_SLOTS, options).slots_RS
        assert np.array_equal(slots_RS, again_RS)
        made += int((slots_RS[:, HOME_SLOTS:] != EMPTY).sum())
    assert (made > 0) == (price_tokens < 1e6)


def test_replicas_stay_on_the_node_of_their_home() -> None:
    for replica in replicas_of(planned(skewed_counts(3), num_nodes=2), HOME_SLOTS):
        assert replica.home_rank // 2 == replica.rank // 2
        assert replica.home_rank != replica.rank


@pytest.mark.parametrize("seed", range(10))
def test_rows_are_sent_in_the_order_of_ranks_and_slots(seed: int) -> None:
    """Against the plain way: for every choice, the slot whose rows it is among, looked up one by one."""
    counts_RE = skewed_counts(seed)
    slots_RS = planned(counts_RE)
    sent_RRS = split_tokens(counts_RE, slots_RS, HOME_SLOTS)
    for source in range(RANKS):
        ids = np.repeat(np.arange(EXPERTS), counts_RE[source])
        ids_TK = torch.from_numpy(np.random.default_rng(seed).permutation(ids)).reshape(-1, 2)
        identity_E = torch.arange(EXPERTS)
        rows_TK, _ = reference.dispatch_map(ids_TK, identity_E, EXPERTS)
        moved_TK = moved(rows_TK, sent_RRS[source], slots_RS)
        assert sorted(moved_TK.flatten().tolist()) == list(range(ids_TK.numel()))
        slot_of_row = np.repeat(slots_RS.ravel(), sent_RRS[source].ravel())
        assert slot_of_row[moved_TK.numpy()].tolist() == ids_TK.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_choices_of_physical_slots(seed: int) -> None:
    """Each goes to a slot of its expert, every slot gets its share, and an expert's tokens keep their order."""
    counts_RE = skewed_counts(seed)
    slots_RS = planned(counts_RE)
    sent_RRS = split_tokens(counts_RE, slots_RS, HOME_SLOTS)
    for source in range(RANKS):
        ids = np.random.default_rng(seed).permutation(np.repeat(np.arange(EXPERTS), counts_RE[source]))
        ids_TK = torch.from_numpy(np.stack([ids, np.full_like(ids, EXPERTS)], axis=1))  # the second choice is dropped
        rows_TK, _ = reference.dispatch_map(ids_TK, torch.arange(EXPERTS), EXPERTS)
        segments_2P = torch.from_numpy(np.stack(segment_shifts(sent_RRS[source], slots_RS)))
        empty_behind_2N = torch.nn.functional.pad(segments_2P, (0, 2))
        slot_TK = slot_of_rows(rows_TK, empty_behind_2N, slots_RS, len(ids))
        assert (slot_TK[:, 1] == slots_RS.size).all()
        slot_T = slot_TK[:, 0].numpy()
        assert slots_RS.ravel()[slot_T].tolist() == ids.tolist()
        assert np.bincount(slot_T, minlength=slots_RS.size).tolist() == sent_RRS[source].ravel().tolist()
        for expert in range(EXPERTS):
            assert (np.diff(slot_T[ids == expert]) >= 0).all()


def test_dropped_choices_stay_dropped() -> None:
    slots_RS = homes_only(EXPERTS, RANKS, SPARE)
    slots_RS[3, 2] = 0
    sent_RS = np.zeros((RANKS, 3), dtype=np.int64)
    sent_RS[0, 0], sent_RS[3, 2] = 1, 1
    rows_TK = torch.tensor([[0, -1], [1, -1]], dtype=torch.int32)
    assert moved(rows_TK, sent_RS, slots_RS).tolist() == [[0, -1], [1, -1]]
    sent_RS[1, 0] = 1  # a row of expert 2, between the two segments of expert 0 on the way, behind them in the map
    rows_TK = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)
    assert moved(rows_TK, sent_RS, slots_RS).tolist() == [[0, 1], [2, -1]]


def test_a_rank_without_tokens_moves_nothing() -> None:
    slots_RS = homes_only(EXPERTS, RANKS, SPARE)
    rows_TK = torch.full((3, 2), -1, dtype=torch.int32)
    assert torch.equal(moved(rows_TK, np.zeros((RANKS, 3), dtype=np.int64), slots_RS), rows_TK)
