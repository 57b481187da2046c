"""Which rows cross nodes once, and the sizes of both hops, on examples that are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smartmoe.ops import dispatch_map
from megatron_smartmoe.runtime.hierarchical_exchange import ExchangeSizes, rows_once

pytestmark = pytest.mark.fast


def test_each_token_has_one_row_for_each_node() -> None:
    # Four slots on two nodes. Rows by slot: slot 0 {t0, t2}, slot 1 {t0, t1}, slot 2 {t1}, slot 3 {t2}
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=torch.int32)
    rows_TK, tokens_S = dispatch_map(ids_TK, torch.arange(4), 4)
    assert rows_TK.tolist() == [[0, 2], [3, 4], [5, 1]]
    found = rows_once(rows_TK, tokens_S.view(2, -1).sum(dim=1).cumsum(0))
    assert found.number_N.tolist() == [3, 2]
    assert found.first_M[:5].tolist() == [0, 1, 3, 4, 5]  # t0, t2, t1 for node 0; t1, t2 for node 1
    assert found.copy_M.tolist() == [0, 1, 0, 2, 0, 1]  # row 2 is t0's second choice: a copy of the first row


def test_what_is_dropped_is_sent_nowhere() -> None:
    ids_TK = torch.tensor([[0, -1], [-1, -1], [3, 2]], dtype=torch.int32)
    rows_TK, tokens_S = dispatch_map(ids_TK, torch.arange(4), 4)
    found = rows_once(rows_TK, tokens_S.view(2, -1).sum(dim=1).cumsum(0))
    assert found.number_N.tolist() == [1, 1]
    # t2 is in row 2 (slot 3) by its first choice and in row 1 (slot 2) by its second: its first choice is sent
    assert found.first_M[:2].tolist() == [0, 2]
    assert found.copy_M[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_copies_are_the_rows_themselves(num_tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens + top_k)
    choices = [torch.randperm(8, generator=generator)[:top_k] for _ in range(num_tokens)]
    ids_TK = torch.stack(choices).int() if choices else torch.empty(0, top_k, dtype=torch.int32)
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.2] = -1
    rows_TK, tokens_S = dispatch_map(ids_TK, torch.randperm(8, generator=generator), 8)
    ends_N = tokens_S.view(4, -1).sum(dim=1).cumsum(0)
    found = rows_once(rows_TK, ends_N)
    token_N = torch.full((int(tokens_S.sum()),), -1)
    for token, rows in enumerate(rows_TK.tolist()):
        token_N[[row for row in rows if row >= 0]] = token
    sent_N = found.first_M[: int(found.number_N.sum())]
    for node, (end, number) in enumerate(zip(ends_N.tolist(), found.number_N.tolist(), strict=True)):
        begin, before = (int(each[:node].sum()) for each in (tokens_S.view(4, -1).sum(dim=1), found.number_N))
        of_node = token_N[sent_N[before : before + number]]
        assert sorted(of_node.tolist()) == sorted(set(token_N[begin:end].tolist()))  # each token once
        assert torch.equal(of_node[found.copy_M[begin:end].long()], token_N[begin:end])


def test_sizes_of_one_rank_follow_from_everybodys_counts() -> None:
    sent_RR = np.arange(16).reshape(4, 4)  # rank r sends 4 r + q rows to rank q
    once_RN = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    sizes = ExchangeSizes.of(sent_RR, once_RN, rank=2)  # the first rank of the second node; its peer is rank 0
    assert sizes.once_sent_N.tolist() == [5, 6]
    assert sizes.once_received_N.tolist() == [2, 6]
    assert sizes.relayed_NL.tolist() == [[2, 3], [10, 11]]
    assert sizes.sent_NL.tolist() == [[8, 9], [10, 11]]
    assert sizes.received_NL.tolist() == [[2, 6], [10, 14]]
    # flat: 8 + 9 + 11 out; in two hops: 5 out to the other node and 3 + 11 to the neighbour, 2 and 6 + 14 in
    assert sizes.port_rows(2) == (28 + 22) // 2
