"""The CUDA kernels against their twins. Nothing here runs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.ops import packed, reference
from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear, wants_counts_on_device
from megatron_smartmoe.runtime.replicas.device_plan import DevicePlanner
from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions, RankView
from tests.unit.ops.activation_cases import Gated, assert_equal_to_rounding, gated_rows
from tests.unit.ops.dispatch_cases import Routing, Rows, assert_near, permuted_rows, routings
from tests.unit.ops.routing_cases import Routed, check_packed, chunk_counts, routed_tokens
from tests.unit.runtime.test_dispatch_plan import content

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CUDA kernels cannot run here"),
]

KERNELS: Any = torch.ops.smartmoe
STEP = 2048  # choices that a block takes at a time; 64 blocks at most


def test_the_kernels_are_what_is_tested() -> None:
    way_out = "SMARTMOE_CUDA=1 python megatron_smartmoe/ops/_build.py"
    assert ops.backend() == "compiled (cpu+cuda)", (
        f"the twin would be compared with itself; build the kernels: {way_out}"
    )


def put(tensor: Tensor) -> Tensor:
    """On the GPU with the strides it has, so that views stay views."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


@given(routings())
@settings(deadline=None, max_examples=200)
def test_map_equals_its_twin(case: Routing) -> None:
    found = ops.dispatch_map(put(case.ids_TK), put(case.slot_of_E), case.num_slots)
    expected = reference.dispatch_map(case.ids_TK, case.slot_of_E, case.num_slots)
    for on_gpu, on_cpu in zip(found, expected, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


def assert_map_equals_its_twin(ids: Tensor, slot_of: Tensor) -> None:
    expected = reference.dispatch_map(ids.cpu(), slot_of.cpu(), slot_of.numel())
    for on_gpu, on_cpu in zip(ops.dispatch_map(ids, slot_of, slot_of.numel()), expected, strict=True):
        assert on_gpu.device == ids.device
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("num_slots", [1, 33, 128, 2048])
@pytest.mark.parametrize("num_tokens", [1, STEP // 8 - 1, STEP // 8, STEP // 8 + 1, 16384, 64 * STEP // 8 + 1, 70_000])
def test_map_of_many_choices(num_tokens: int, num_slots: int) -> None:
    ids = torch.randint(-1, num_slots + 2, (num_tokens, 8), device="cuda")
    slot_of = torch.randperm(num_slots, device="cuda")
    for _ in range(2):  # the same bits every time
        assert_map_equals_its_twin(ids, slot_of)


@pytest.mark.parametrize("hot_share", [0.36, 0.9, 1.0])
def test_map_of_skewed_choices(hot_share: float) -> None:
    ids = torch.randint(0, 32, (16384, 8), device="cuda")
    ids[torch.rand(ids.shape, device="cuda") < hot_share] = 5
    assert_map_equals_its_twin(ids, torch.randperm(32, device="cuda"))


def test_map_of_a_strided_view() -> None:
    assert_map_equals_its_twin(torch.randint(-1, 64, (333, 6), device="cuda").t()[::2], torch.arange(64).cuda())


def test_map_on_the_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    assert_map_equals_its_twin(torch.randint(0, 16, (5000, 2), device="cuda:1"), torch.arange(16, device="cuda:1"))
    assert torch.cuda.current_device() == 0


def test_opcheck() -> None:
    ids, slot_of = torch.randint(-1, 9, (13, 4), device="cuda"), torch.arange(8, device="cuda")
    torch.library.opcheck(KERNELS.dispatch_map.default, (ids, slot_of, 8))


def assert_rows_near(found: Tensor, expected: Tensor) -> None:
    """A GPU fuses multiplications and additions: one rounding less for each, one more or less at the end."""
    rtol = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=1e-4)


@given(permuted_rows((torch.float16, torch.bfloat16, torch.float32)))
@settings(deadline=None, max_examples=200)
def test_rows_equal_their_twins(case: Rows) -> None:
    x_TH, y_NH, rows_TK, weights_TK = put(case.x_TH), put(case.y_NH), put(case.rows_TK), put(case.weights_TK)
    y = ops.permute(x_TH, rows_TK, case.num_rows)
    assert torch.equal(y.cpu(), reference.permute(case.x_TH, case.rows_TK, case.num_rows))
    plain = ops.unpermute(y_NH, rows_TK)
    assert torch.equal(plain.cpu(), reference.unpermute(case.y_NH, case.rows_TK, None))
    weighted = ops.unpermute(y_NH, rows_TK, weights_TK)
    assert_rows_near(weighted, reference.unpermute(case.y_NH, case.rows_TK, case.weights_TK))
    grad_y, grad_weights = KERNELS.unpermute_backward(x_TH, y_NH, rows_TK, weights_TK)
    expected = reference.unpermute_backward(case.x_TH, case.y_NH, case.rows_TK, case.weights_TK)
    assert torch.equal(grad_y.cpu(), expected[0])
    assert_near(grad_weights.cpu(), expected[1], case)


@given(gated_rows((torch.float16, torch.bfloat16, torch.float32)))
@settings(deadline=None, max_examples=200)
def test_swiglu_equals_its_twin(case: Gated) -> None:
    args = put(case.grad_NF), put(case.inner_NG), put(case.probs_N)
    found = KERNELS.swiglu(*args[1:]), *KERNELS.swiglu_backward(*args)
    expected = (
        reference.swiglu(case.inner_NG, case.probs_N),
        *reference.swiglu_backward(case.grad_NF, case.inner_NG, case.probs_N),
    )
    assert_equal_to_rounding(tuple(one.cpu() for one in found), expected, case)


@given(permuted_rows((torch.float16, torch.bfloat16, torch.float32)))
@settings(deadline=None, max_examples=100)
def test_weights_move_with_the_rows(case: Rows) -> None:
    args = case.x_TH, case.weights_TK, case.rows_TK, case.num_rows
    expected = reference.permute_weighted(*args)
    found = ops.permute_weighted(put(case.x_TH), put(case.weights_TK), put(case.rows_TK), case.num_rows)
    for on_gpu, on_cpu in zip(found, expected, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)
    grads = KERNELS.permute_weighted_backward(put(case.y_NH), found[1], put(case.rows_TK))
    for on_gpu, on_cpu in zip(
        grads, reference.permute_weighted_backward(case.y_NH, expected[1], case.rows_TK), strict=True
    ):
        assert torch.equal(on_gpu.cpu(), on_cpu)


@given(permuted_rows((torch.float16, torch.bfloat16, torch.float32)), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_rows_are_packed_and_joined_as_by_the_twins(case: Rows, share: float) -> None:
    check_packed(KERNELS, case, share, put)


@given(routed_tokens())
@settings(deadline=None, max_examples=100)
def test_chosen_experts_equal_their_twin(case: Routed) -> None:
    num_experts = case.routing_map_TE.shape[1]
    found = ops.chosen_experts(put(case.routing_map_TE), put(case.probs_TE), case.top_k)
    expected = reference.chosen_experts(case.routing_map_TE, case.probs_TE, case.top_k)
    for on_gpu, on_cpu in zip(found, expected, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)
    grad = KERNELS.chosen_experts_backward(found[1], found[0], num_experts)
    assert torch.equal(grad.cpu(), reference.chosen_experts_backward(expected[1], expected[0], num_experts))


@given(chunk_counts())
@settings(deadline=None, max_examples=100)
def test_chunk_rows_equal_their_twin(counts_QS: Tensor) -> None:
    num_rows = int(counts_QS.sum())
    found = ops.chunk_rows(put(counts_QS), num_rows)
    for on_gpu, on_cpu in zip(found, reference.chunk_rows(counts_QS, num_rows), strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_without_rows_have_no_gradient(dtype: torch.dtype) -> None:
    """Whatever multiplies the groups here, in memory that is full of garbage, and what it says of host waits."""
    torch.full((64, 128, 128), float("nan"), device="cuda", dtype=dtype)
    rows = torch.randn(96, 128, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 128, 128, device="cuda", dtype=dtype, requires_grad=True)
    on_device = wants_counts_on_device(rows)
    tokens_S = torch.tensor([32, 0, 64, 0], device="cuda" if on_device else "cpu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped_linear(rows, weight, Groups.of(rows, tokens_S))
        out.backward(torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad is not None
    assert not weight.grad[[1, 3]].any()
    assert weight.grad[[0, 2]].any(dim=(1, 2)).all()


@pytest.mark.parametrize("num_choices", [2, 4, 8])
def test_sums_do_not_depend_on_the_placement(num_choices: int) -> None:
    ids = torch.rand(500, 64, device="cuda").topk(num_choices, dim=1).indices
    factor_E = torch.randn(64, 1024, device="cuda").bfloat16()
    x_TH, weights = torch.randn(500, 1024, device="cuda").bfloat16(), torch.rand(ids.shape, device="cuda")
    sums = []
    for slot_of_E in (torch.arange(64, device="cuda"), torch.randperm(64, device="cuda")):
        rows_TK, tokens_S = ops.dispatch_map(ids, slot_of_E, 64)
        factors = factor_E[torch.argsort(slot_of_E)].repeat_interleave(tokens_S, dim=0)
        sums.append(ops.unpermute(ops.permute(x_TH, rows_TK, ids.numel()) * factors, rows_TK, weights))
    assert torch.equal(*sums)


def test_more_elements_than_32_bits_count() -> None:
    tokens, hidden = 300_000, 8192
    if torch.cuda.mem_get_info()[0] < 4 * tokens * hidden * 2:
        pytest.skip("less than 20 GB of free device memory")
    rows_TK = torch.arange(tokens - 1, -1, -1, device="cuda", dtype=torch.int32)[:, None]
    x_TH = torch.arange(tokens, device="cuda")[:, None].expand(tokens, hidden).to(torch.bfloat16)
    y_NH = ops.permute(x_TH, rows_TK, tokens)
    assert torch.equal(y_NH, x_TH.flip(0))
    assert torch.equal(ops.unpermute(y_NH, rows_TK), x_TH)


def test_dispatch_on_a_side_stream_in_a_graph_and_without_waiting() -> None:
    ids, slot_of = torch.randint(0, 16, (3000, 2), device="cuda"), torch.randperm(16, device="cuda")
    x_TH, weights = torch.randn(3000, 512, device="cuda"), torch.rand(3000, 2, device="cuda")

    def dispatch() -> Tensor:
        rows_TK, _ = ops.dispatch_map(ids, slot_of, 16)
        return ops.unpermute(ops.permute(x_TH, rows_TK, ids.numel()), rows_TK, weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = dispatch()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(beside, dispatch())

    torch.cuda.set_sync_debug_mode("error")
    try:
        dispatch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dispatch()
    ids.copy_(torch.randint(0, 16, ids.shape, device="cuda"))
    graph.replay()
    assert torch.equal(captured, dispatch())


def test_the_placement_of_a_micro_batch_is_planned_as_on_the_cpu() -> None:
    view = RankView(num_ranks=8, tp_size=1, num_experts=64, num_slots=9, num_nodes=1, rank=3, tp_rank=0)
    counts_RE = torch.randint(0, 50, (8, 64)) * (torch.arange(64) % 7 == 0) + 1
    exact = ExactOptions(used_slots=1)
    on_cpu, on_gpu = (
        DevicePlanner(view, pinned=device == "cuda").plan(counts_RE.to(device), exact) for device in ("cpu", "cuda")
    )
    assert on_cpu.has_replicas
    assert content(on_gpu) == content(on_cpu)


def test_gradients_flow() -> None:
    ids, slot_of = torch.randint(-1, 8, (100, 4)), torch.randperm(8)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        x_TH = torch.randn(100, 40).to(device).requires_grad_()
        weights = torch.rand(100, 4).to(device).requires_grad_()
        rows_TK, _ = ops.dispatch_map(ids.to(device), slot_of.to(device), 8)
        ops.unpermute(ops.permute(x_TH, rows_TK, 400).square(), rows_TK, weights).sum().backward()
        results.append((x_TH.grad, weights.grad))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-4)


def test_errors_are_those_of_the_cpu() -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64, device="cuda:0")
    text = r"^ids_TK\.dtype = float32: it must be int32 or int64\. Convert it with ids_TK\.long\(\)$"
    with pytest.raises(RuntimeError, match=text):
        ops.dispatch_map(ids.float(), ids[0], 3)
    text = r"^slot_of_E\.device = cpu: it must be cuda:0, as ids_TK has it\."
    with pytest.raises(RuntimeError, match=text):
        ops.dispatch_map(ids, torch.arange(3), 3)
    y_NH = torch.zeros(4, 8, dtype=torch.float64, device="cuda")
    with pytest.raises(
        RuntimeError, match=r"^y_NH\.dtype = float64: on a GPU it must be float16, bfloat16 or float32\."
    ):
        ops.unpermute(y_NH, ids.int())


@pytest.mark.parametrize("hidden", [40, 13])
def test_tiny_dispatch(hidden: int) -> None:
    """Small enough for compute-sanitizer: every kernel once, with dropped choices and rows that no choice names."""
    ids, slot_of = torch.randint(-1, 5, (70, 3), device="cuda"), torch.randperm(5, device="cuda")
    rows_TK, _ = ops.dispatch_map(ids, slot_of, 5)
    x_TH = torch.randn(70, hidden, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(70, 3, device="cuda").requires_grad_()
    ops.unpermute(ops.permute(x_TH, rows_TK, 215), rows_TK, weights).sum().backward()
    assert x_TH.grad is not None
    assert torch.isfinite(x_TH.grad).all()
    inner_NG = torch.randn(19, 2 * hidden, device="cuda").bfloat16().requires_grad_()
    ops.swiglu(inner_NG, torch.rand(19, device="cuda").requires_grad_()).sum().backward()
    chosen = torch.rand(70, 40, device="cuda") < 0.1
    KERNELS.chosen_experts_backward(*reversed(ops.chosen_experts(chosen, torch.rand(70, 40, device="cuda"), 3)), 40)
    counts_QS = torch.randint(0, 9, (5, 7), device="cuda")
    order = ops.chunk_rows(counts_QS, int(counts_QS.sum()))[0][:, None]
    y_NH = torch.randn(len(order), hidden, device="cuda").requires_grad_()
    weights_N1 = torch.rand(order.shape, device="cuda")
    ops.permute_weighted(y_NH, weights_N1, order, len(order))[0].sum().backward()
    rows_NH, weights_N = packed.unpack(ops.permute_packed(y_NH, weights_N1, order, len(order)), hidden, torch.float32)
    (rows_NH.sum() + weights_N.sum()).backward()
    KERNELS.permute_joined(rows_NH[:20].detach(), y_NH[20:].detach(), order, len(order))
    KERNELS.zero_empty_groups(torch.ones(3, 2, hidden, device="cuda"), torch.tensor([0, 4, 4], device="cuda").int())
