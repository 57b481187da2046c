"""chosen_experts, permute_weighted, chunk_rows: kernels, twins, loops that say what they mean, and Megatron's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.adapter.moe.chunk_order import ChunkOrder
from megatron_smartmoe.ops import reference
from tests.unit.ops.dispatch_cases import Rows, permuted_rows
from tests.unit.ops.routing_cases import Routed, chunk_counts, routed_tokens
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
    for ours in (True, False):
        rows, weights = (each.clone().requires_grad_() for each in drawn)
        if ours:
            order = ChunkOrder.of(counts_QS, rows)
            assert (order is None) == (1 in counts_QS.shape)
            sorted_NH, sorted_N = (rows, weights) if order is None else order.sort(rows, weights)
            back_NH = sorted_NH * 2 if order is None else order.restore(sorted_NH * 2)
        else:
            sorted_NH, sorted_N = sort_chunks_by_idxs(rows, counts_QS.ravel(), to_slots, probs=weights)
            back_NH, _ = sort_chunks_by_idxs(sorted_NH * 2, counts_QS.T.ravel(), to_sources)
        loss = (back_NH.float() * drawn[0].float()).sum() + (sorted_N * torch.arange(num_rows)).sum()
        loss.backward()
        results.append((sorted_NH, sorted_N, back_NH, rows.grad, weights.grad))
    for found, expected in zip(*results, strict=True):
        assert found.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_gradients() -> None:
    torch.manual_seed(0)
    chosen = torch.rand(6, 5) < 0.4
    probs = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda probs: ops.chosen_experts(chosen, probs, 2)[1], (probs,))
    rows_TK = torch.tensor([[3, 0], [-1, 2], [5, 9]], dtype=torch.int32)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.permute_weighted(x, w, rows_TK, 7), (x, weights))


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
