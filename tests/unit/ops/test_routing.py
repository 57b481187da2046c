"""chosen_experts, permute_weighted, chunk_rows: kernels, twins, loops that say what they mean, and Megatron's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.adapter.moe.chunk_order import ChunkOrder
from megatron_smartmoe.ops import packed, reference
from tests.unit.ops.dispatch_cases import Rows, permuted_rows
from tests.unit.ops.routing_cases import Routed, check_packed, chunk_counts, routed_tokens
from tests.unit.ops.test_dispatch import needs_library

KERNELS: Any = torch.ops.smartmoe


@needs_library
@given(routed_tokens())
@settings(deadline=None, max_examples=100)
def test_chosen_experts_ascend(case: Routed) -> None:
    num_experts = case.routing_map_TE.shape[1]
    for served in (KERNELS, reference):
        ids_TK, weights_TK = served.chosen_experts(case.routing_map_TE, case.probs_TE, case.top_k)
        assert (ids_TK.dtype, weights_TK.dtype) == (torch.int32, case.probs_TE.dtype)
        grad_TE = served.chosen_experts_backward(weights_TK, ids_TK, num_experts)
        expected_TE = torch.zeros_like(case.probs_TE)
        for token, chosen in enumerate(case.routing_map_TE.tolist()):
            experts = [e for e, is_chosen in enumerate(chosen) if is_chosen][: case.top_k]
            missing = case.top_k - len(experts)
            assert ids_TK[token].tolist() == experts + [num_experts] * missing
            assert torch.equal(weights_TK[token, : len(experts)], case.probs_TE[token, experts])
            assert not weights_TK[token, len(experts) :].any()
            expected_TE[token, experts] = case.probs_TE[token, experts]
        assert torch.equal(grad_TE, expected_TE)


@needs_library
@given(permuted_rows())
@settings(deadline=None, max_examples=100)
def test_weights_move_with_the_rows(case: Rows) -> None:
    args = case.x_TH, case.weights_TK, case.rows_TK, case.num_rows
    y_NH, weights_N = KERNELS.permute_weighted(*args)
    assert torch.equal(y_NH, KERNELS.permute(case.x_TH, case.rows_TK, case.num_rows))
    expected_N = torch.zeros(case.num_rows, dtype=case.weights_TK.dtype)
    for row, weight in zip(case.rows_TK.flatten().tolist(), case.weights_TK.flatten(), strict=True):
        if 0 <= row < case.num_rows:
            expected_N[row] = weight
    assert torch.equal(weights_N, expected_N)
    for one, other in zip((y_NH, weights_N), reference.permute_weighted(*args), strict=True):
        assert torch.equal(one, other)
    grads = case.y_NH, expected_N, case.rows_TK
    expected = reference.permute_weighted_backward(*grads)
    for one, other in zip(KERNELS.permute_weighted_backward(*grads), expected, strict=True):
        assert torch.equal(one, other)


@needs_library
@given(permuted_rows(), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_rows_are_packed_and_joined_as_by_the_twins(case: Rows, share: float) -> None:
    for served in (KERNELS, reference):
        check_packed(served, case, share)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden", [0, 1, 7, 8])
def test_packed_rows_are_found_where_they_lie(hidden: int, weights: torch.dtype) -> None:
    """What is packed already is taken as it is, and anything else is copied: bits and gradients are the same."""
    packed_NP = torch.zeros(5, packed.width(hidden, torch.bfloat16, weights), dtype=torch.bfloat16)
    rows_NH, weights_N = packed.views(packed_NP, hidden, weights)
    assert packed.whole(rows_NH[1:4], weights_N[1:4]).data_ptr() == packed_NP[1].data_ptr()
    assert packed.whole(rows_NH[:0], weights_N[:0]).shape == packed_NP[:0].shape
    rows_NH.copy_(torch.randn(rows_NH.shape))
    weights_N.copy_(torch.rand(5))
    others = (rows_NH[:3], weights_N[1:4]), (rows_NH.clone(), weights_N), (rows_NH, weights_N.clone())
    for one, two in others:
        copied_NP = packed.whole(one, two)
        assert copied_NP.data_ptr() != packed_NP.data_ptr()
        for found, expected in zip(packed.views(copied_NP, hidden, weights), (one, two), strict=True):
            assert torch.equal(found, expected)
    leaves = rows_NH.clone().requires_grad_(), weights_N.clone().requires_grad_()
    sent = packed.unpack(packed.pack(*leaves)[[4, 0, 1]], hidden, weights)
    ((sent[0].float() * 2).sum() + sent[1].sum()).backward()
    for leaf, factor in zip(leaves, (2, 1), strict=True):
        expected = torch.zeros_like(leaf)
        expected[[4, 0, 1]] = factor
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


@needs_library
@given(chunk_counts())
@settings(deadline=None, max_examples=100)
def test_chunk_rows_sort_by_slot_and_back(counts_QS: Tensor) -> None:
    num_rows = int(counts_QS.sum())
    chunk_N = torch.arange(counts_QS.numel()).repeat_interleave(counts_QS.flatten())
    expected = sorted(range(num_rows), key=lambda row: (int(chunk_N[row]) % counts_QS.shape[1], row))
    for served in (KERNELS, reference):
        to_slots_N, to_sources_N = served.chunk_rows(counts_QS, num_rows)
        assert (to_slots_N.dtype, to_sources_N.dtype) == (torch.int32, torch.int32)
        assert to_sources_N.tolist() == expected
        assert torch.equal(to_slots_N[to_sources_N.long()], torch.arange(num_rows, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[[2, 0, 3], [1, 4, 0]], [[0, 0], [0, 0]], [[5, 1]], [[3], [0], [2]]])
def test_the_second_permutation_has_megatrons_bits(counts: list[list[int]], dtype: torch.dtype) -> None:
    counts_QS = torch.tensor(counts)
    num_rows, blocks = int(counts_QS.sum()), torch.arange(counts_QS.numel())
    to_slots = blocks.view(counts_QS.shape).T.ravel()
    to_sources = blocks.view(counts_QS.T.shape).T.ravel()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(num_rows, 8, generator=generator).to(dtype), torch.rand(num_rows, generator=generator)
    drawn[0][:1] = -0.0
    results = []
    for way in ((True, False, False), (True, True, False), (True, True, True), (False, False, False)):
        is_ours, packs, in_blocks = way
        rows, weights = (each.clone().requires_grad_() for each in drawn)
        if is_ours:
            order: Any = ChunkOrder.of(counts_QS, rows)
            assert (order is None) == (1 in counts_QS.shape)
            if order is None:
                sorted_NH, sorted_N, back_NH = rows, weights, rows * 2
            elif not in_blocks:
                sorted_NH, sorted_N = order.sort(rows, weights, packs=packs)
                back_NH = order.restore(sorted_NH * 2)
            else:
                home_rows = int(counts_QS[:, 0].sum())
                rows_of_blocks, weights_of_blocks = order.sort(rows, weights, packs=packs, home_rows=home_rows)
                assert len(rows_of_blocks[0]) == len(weights_of_blocks[0]) == home_rows
                sorted_NH, sorted_N = torch.cat(rows_of_blocks), torch.cat(weights_of_blocks)
                back_NH = order.restore((rows_of_blocks[0] * 2, rows_of_blocks[1] * 2))
        else:
            sorted_NH, sorted_N = sort_chunks_by_idxs(rows, counts_QS.ravel(), to_slots, probs=weights)
            back_NH, _ = sort_chunks_by_idxs(sorted_NH * 2, counts_QS.T.ravel(), to_sources)
        loss = (back_NH.float() * drawn[0].float()).sum() + (sorted_N * torch.arange(num_rows)).sum()
        loss.backward()
        results.append((sorted_NH, sorted_N, back_NH, rows.grad, weights.grad))
    *ours, megatrons = results
    for result in ours:
        for found, expected in zip(result, megatrons, strict=True):
            assert found is not None
            assert expected is not None
            assert found.contiguous().view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_gradients() -> None:
    torch.manual_seed(0)
    chosen = torch.rand(6, 5) < 0.4
    probs = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda probs: ops.chosen_experts(chosen, probs, 2)[1], (probs,))
    rows_TK = torch.tensor([[3, 0], [-1, 2], [5, 9]], dtype=torch.int32)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.permute_weighted(x, w, rows_TK, 7), (x, weights))

    def of_two_blocks(x: Tensor, w: Tensor, more_x: Tensor, more_w: Tensor) -> tuple[Tensor, Tensor]:
        packed_NP = ops.permute_packed(x, w, rows_TK, 7, more_TH=more_x, more_weights_TK=more_w)
        return packed.unpack(packed_NP, 4, w.dtype)

    parts = (each.detach().requires_grad_() for each in (x[:2], weights[:2], x[2:], weights[2:]))
    assert torch.autograd.gradcheck(of_two_blocks, tuple(parts))


def test_opcheck() -> None:
    chosen, probs = torch.rand(6, 5) < 0.4, torch.rand(6, 5, requires_grad=True)
    # its check of compilation adds up all results, integers too
    without_compilation = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(KERNELS.chosen_experts.default, (chosen, probs, 2), test_utils=without_compilation)
    ids_TK, weights_TK = ops.chosen_experts(chosen, probs.detach(), 2)
    torch.library.opcheck(KERNELS.chosen_experts_backward.default, (weights_TK, ids_TK, 5))
    rows_TK, _ = ops.dispatch_map(ids_TK, torch.arange(5), 5)
    x_TH, weights_TK = torch.randn(6, 4, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    torch.library.opcheck(KERNELS.permute_weighted.default, (x_TH, weights_TK, rows_TK, 12))
    blocks = x_TH[:4], weights_TK[:4], x_TH[4:], weights_TK[4:]
    # its check of compilation reads what lies between rows and weights
    torch.library.opcheck(KERNELS.permute_packed.default, (*blocks, rows_TK, 12), test_utils=without_compilation)
    torch.library.opcheck(KERNELS.permute_joined.default, (x_TH.detach()[:4], x_TH.detach()[4:], rows_TK, 12))
    grads = torch.randn(12, 4), torch.rand(12), rows_TK
    torch.library.opcheck(KERNELS.permute_weighted_backward.default, grads)
    torch.library.opcheck(KERNELS.chunk_rows.default, (torch.tensor([[2, 0], [1, 3]]), 6))


def test_counts_of_other_rows_are_refused_on_the_cpu() -> None:
    for counts, num_rows in (([[2, 1]], 4), ([[2, 1]], 2), ([[2**62, 2**62]], 5)):
        with pytest.raises(RuntimeError, match=rf"^num_rows = {num_rows}: it must be the sum of counts_QS\. Pass"):
            KERNELS.chunk_rows(torch.tensor(counts), num_rows)
    with pytest.raises(RuntimeError, match=r"^counts_QS has -1: it must not be negative\. Pass counts of rows$"):
        KERNELS.chunk_rows(torch.tensor([[-1, 2]]), 1)


MAP, PROBS, IDS = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int32)
X, WEIGHTS = torch.zeros(3, 5), torch.zeros(3, 2)
ERRORS = [
    (
        "chosen_experts",
        (MAP.int(), PROBS, 2),
        "routing_map_TE.dtype = int32: it must be bool. Convert it with routing_map_TE.bool()",
    ),
    (
        "chosen_experts",
        (MAP[0], PROBS, 2),
        "routing_map_TE.shape = [4]: it must be [T, E]. Pass which experts each token chose",
    ),
    (
        "chosen_experts",
        (MAP, PROBS[:2], 2),
        "probs_TE.shape = [2, 4]: it must be [3, 4], as routing_map_TE has it. Pass a probability per token and expert",
    ),
    (
        "chosen_experts",
        (MAP, PROBS, 0),
        "top_k = 0: it must be in 1..2048. Pass the number of experts that a token chooses",
    ),
    (
        "chosen_experts_backward",
        (WEIGHTS, IDS.long(), 4),
        "ids_TK.dtype = int64: it must be int32. Convert it with ids_TK.int()",
    ),
    (
        "chosen_experts_backward",
        (WEIGHTS.t(), IDS, 4),
        "grad_TK.shape = [2, 3]: it must be [3, 2], as ids_TK has it. Pass the gradient of the weights",
    ),
    (
        "chosen_experts_backward",
        (WEIGHTS, IDS, -1),
        "num_experts = -1: it must be in 0..2147483647. Pass the number of experts",
    ),
    (
        "permute_weighted",
        (X, WEIGHTS.t(), IDS, 6),
        "weights_TK.shape = [2, 3]: it must be [3, 2], as rows_TK has it. Pass a weight per choice",
    ),
    (
        "permute_weighted_backward",
        (torch.zeros(6, 5), torch.zeros(5), IDS),
        "grad_N.shape = [5]: it must be [N] = [6], as grad_NH has it. Pass the gradient of the permuted weights",
    ),
    (
        "permute_packed",
        (X, WEIGHTS, X, None, IDS, 6),
        "more_TH, more_weights_TK: one is missing: it must be both there or both None. Pass the other one too",
    ),
    (
        "permute_packed",
        (X[:1], WEIGHTS, X[1:], WEIGHTS[1:], IDS, 6),
        "weights_TK.shape = [3, 2]: it must be [T, K_top] = [1, 2], as x_TH and rows_TK have it. Pass a weight "
        "per choice",
    ),
    (
        "permute_packed",
        (X[:1], WEIGHTS[:1], X[1:], WEIGHTS[1:].double(), IDS, 6),
        "more_weights_TK.dtype = float64: it must be float32, as weights_TK is. Convert it with "
        "more_weights_TK.to(weights_TK.dtype)",
    ),
    (
        "permute_joined",
        (X, X, IDS, 6),
        "rows_TK.shape = [3, 2]: it must be [T, K_top] with T = 6, as x_TH and more_TH have it. Pass the rows of "
        "the same tokens",
    ),
    (
        "permute_joined",
        (X[:1], X[1:, :1], IDS, 6),
        f"more_TH.shape = [2, 1]: it must be [T, H] with H = {X.shape[1]}, as x_TH has it. Pass rows of the same size",
    ),
    (
        "permute_joined",
        (X[:1], X[1:].half(), IDS, 6),
        "more_TH.dtype = float16: it must be float32, as x_TH is. Convert it with more_TH.to(x_TH.dtype)",
    ),
    (
        "chunk_rows",
        (torch.zeros(4, dtype=torch.int64), 0),
        "counts_QS.shape = [4]: it must be [Q, S]. Pass the rows that arrive from each source for each slot",
    ),
    ("chunk_rows", (IDS, 0), "counts_QS.dtype = int32: it must be int64. Convert it to int64"),
]


@pytest.mark.parametrize(("name", "args", "text"), ERRORS)
def test_errors_read_the_same_whatever_serves_the_op(name: str, args: tuple[object, ...], text: str) -> None:
    for module in (KERNELS, reference):
        with pytest.raises(RuntimeError) as caught:
            getattr(module, name)(*args)
        assert str(caught.value) == text
