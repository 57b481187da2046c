"""dispatch_map, permute and unpermute: what serves torch.ops.smartmoe, the twins, and loops that say what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.ops import checks, reference
from tests.unit.ops.dispatch_cases import Routing, Rows, assert_near, permuted_rows, routings

KERNELS: Any = torch.ops.smartmoe
# for CI, where a missing library must not look like success
BUILD_IS_REQUIRED = os.environ.get("SMARTMOE_REQUIRE_BUILD") == "1"
needs_library = pytest.mark.skipif(
    not ops.is_compiled() and not BUILD_IS_REQUIRED,
    reason="the compiled library is not built: python megatron_smartmoe/ops/_build.py",
)


def map_by_loops(case: Routing) -> tuple[list[list[int]], list[int]]:
    """Rows and tokens of dispatch_map, from its definition."""
    ids, slot_of, num_slots = case.ids_TK.tolist(), case.slot_of_E.tolist(), case.num_slots
    rows, tokens, next_row = [[-1] * len(row) for row in ids], [0] * num_slots, 0
    slots = [[slot_of[e] if 0 <= e < len(slot_of) else -1 for e in row] for row in ids]
    for slot in sorted({s for row in slots for s in row if 0 <= s < num_slots}):
        for t, row in enumerate(slots):
            for j, chosen in enumerate(row):
                if chosen == slot:
                    rows[t][j] = next_row
                    tokens[slot] += 1
                    next_row += 1
    return rows, tokens


@needs_library
@given(routings())
@settings(deadline=None, max_examples=200)
def test_the_map_is_a_stable_sort_by_slot(case: Routing) -> None:
    expected_rows, expected_tokens = map_by_loops(case)
    for function in (ops.dispatch_map, reference.dispatch_map):
        rows_TK, tokens_S = function(case.ids_TK, case.slot_of_E, case.num_slots)
        assert (rows_TK.dtype, tokens_S.dtype) == (torch.int32, torch.int64)
        assert rows_TK.tolist() == expected_rows
        assert tokens_S.tolist() == expected_tokens


@needs_library
@given(permuted_rows())
@settings(deadline=None, max_examples=200)
def test_rows_have_the_bits_of_the_twins(case: Rows) -> None:
    """All but the dot products of the weights' gradient, which are summed in another order."""
    y_NH = ops.permute(case.x_TH, case.rows_TK, case.num_rows)
    assert torch.equal(y_NH, reference.permute(case.x_TH, case.rows_TK, case.num_rows))
    for weights_TK in (None, case.weights_TK):
        x_TH = ops.unpermute(case.y_NH, case.rows_TK, weights_TK)
        assert torch.equal(x_TH, reference.unpermute(case.y_NH, case.rows_TK, weights_TK))
    args = (case.x_TH, case.y_NH, case.rows_TK, case.weights_TK)
    (grad_y, grad_weights), expected = KERNELS.unpermute_backward(*args), reference.unpermute_backward(*args)
    assert torch.equal(grad_y, expected[0])
    assert_near(grad_weights, expected[1], case)


def test_a_token_may_choose_an_expert_twice() -> None:
    rows_TK, tokens_S = ops.dispatch_map(torch.tensor([[1, 1], [0, 1], [1, -1]]), torch.tensor([1, 0]), 3)
    assert rows_TK.tolist() == [[0, 1], [4, 2], [3, -1]]
    assert tokens_S.tolist() == [4, 1, 0]


@pytest.mark.parametrize("num_choices", [1, 2, 4, 8])
def test_rows_and_sums_are_those_of_megatron(num_choices: int) -> None:
    """The same order of rows; the same bits of the sum for up to two choices, whose order cannot matter."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_experts, hidden = 200, 16, 24
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(num_choices, dim=1).indices
    x_TH = torch.randn(num_tokens, hidden, generator=generator)
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, ids, True)
    rows_TK, tokens_S = ops.dispatch_map(ids, torch.arange(num_experts), num_experts)
    assert torch.equal(tokens_S, routing_map.sum(0))
    permuted, _, order, *_ = moe_utils.permute(x_TH, routing_map, num_out_tokens=ids.numel())
    assert torch.equal(ops.permute(x_TH, rows_TK, ids.numel()), permuted)
    y_NH = torch.randn(permuted.shape, generator=generator)
    found, expected = ops.unpermute(y_NH, rows_TK), moe_utils.unpermute(y_NH, order, x_TH.shape)
    assert torch.equal(found, expected) == (num_choices <= 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_choices", [2, 4, 8])
def test_sums_and_gradients_do_not_depend_on_the_placement(num_choices: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(50, 16, generator=generator).topk(num_choices, dim=1).indices
    factor_E = torch.randn(16, 24, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    x = torch.randn(50, 24, generator=generator).to(dtype)

    def layer(slot_of_E: Tensor) -> list[Tensor]:
        x_TH, weights_TK = x.clone().requires_grad_(), weights.clone().requires_grad_()
        rows_TK, tokens_S = ops.dispatch_map(ids, slot_of_E, 16)
        rows_by_slot = factor_E[torch.argsort(slot_of_E)].repeat_interleave(tokens_S, dim=0)
        out = ops.unpermute(ops.permute(x_TH, rows_TK, ids.numel()) * rows_by_slot, rows_TK, weights_TK)
        out.square().sum().backward()
        assert x_TH.grad is not None
        assert weights_TK.grad is not None
        return [out.detach(), x_TH.grad, weights_TK.grad]

    home = layer(torch.arange(16))
    for _ in range(5):
        for found, expected in zip(layer(torch.randperm(16, generator=generator)), home, strict=True):
            assert torch.equal(found, expected)


def test_gradients() -> None:
    torch.manual_seed(0)
    ids = torch.randint(-1, 5, (9, 3))
    rows_TK, _ = ops.dispatch_map(ids, torch.tensor([2, 0, 4, 1]), 5)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(27, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, rows_TK, 27), (x,))
    assert torch.autograd.gradcheck(lambda y, w: ops.unpermute(y, rows_TK, w), (y, weights))
    assert torch.autograd.gradcheck(lambda y: ops.unpermute(y, rows_TK), (y,))
    assert torch.autograd.gradcheck(lambda w: ops.unpermute(y.detach(), rows_TK, w), (weights,))


def test_opcheck() -> None:
    torch.manual_seed(0)
    ids, table = torch.randint(-1, 5, (9, 3)), torch.randperm(5)
    rows, _ = ops.dispatch_map(ids, table, 5)
    x, y = torch.randn(9, 8, requires_grad=True), torch.randn(27, 8, requires_grad=True)
    weights = torch.rand(9, 3, requires_grad=True)
    torch.library.opcheck(KERNELS.dispatch_map.default, (ids, table, 5))
    torch.library.opcheck(KERNELS.permute.default, (x, rows, 27))
    torch.library.opcheck(KERNELS.unpermute.default, (y, rows, weights))
    torch.library.opcheck(KERNELS.unpermute.default, (y, rows, None))
    backward_args = (x.detach(), y.detach(), rows, weights.detach())
    torch.library.opcheck(KERNELS.unpermute_backward.default, backward_args)


def test_meta_tensors_give_the_shapes() -> None:
    rows, tokens = ops.dispatch_map(torch.empty(5, 2, dtype=torch.int64, device="meta"), torch.arange(3).to("meta"), 7)
    assert (rows.shape, rows.dtype, tokens.shape, tokens.dtype) == ((5, 2), torch.int32, (7,), torch.int64)
    y = ops.permute(torch.empty(5, 3, device="meta"), rows, 11)
    assert (y.shape, y.dtype) == ((11, 3), torch.float32)
    assert ops.unpermute(y, rows).shape == (5, 3)


IDS, TABLE = torch.zeros(3, 2).long(), torch.arange(4)
X, ROWS, Y, WEIGHTS = torch.zeros(3, 5), torch.zeros(3, 2).int(), torch.zeros(6, 5), torch.ones(3, 2)
NOT_INT = "it must be int32 or int64. Convert it with"
ERRORS = [
    ("dispatch_map", (IDS.float(), TABLE, 4), f"ids_TK.dtype = float32: {NOT_INT} ids_TK.long()"),
    ("dispatch_map", (IDS, TABLE.bool(), 4), f"slot_of_E.dtype = bool: {NOT_INT} slot_of_E.long()"),
    (
        "dispatch_map",
        (IDS[0], TABLE, 4),
        "ids_TK.shape = [2]: it must be [T, K_top]. Pass a row of expert ids per token",
    ),
    (
        "dispatch_map",
        (torch.zeros(1, dtype=torch.int32).expand(2**16, 2**15), TABLE, 4),
        "ids_TK.shape = [65536, 32768]: it must have at most 2147483647 choices. Split the micro-batch",
    ),
    (
        "dispatch_map",
        (IDS, TABLE[:0], 4),
        "slot_of_E.shape = [0]: it must be [E] with at least one expert. Pass the slot of each logical expert",
    ),
    *[
        (
            "dispatch_map",
            (IDS, TABLE, bad),
            f"num_slots = {bad}: it must be in 1..2048. Pass the number of slots that slot_of_E points into",
        )
        for bad in (0, 2049)
    ],
    ("permute", (X[0], ROWS, 6), "x_TH.shape = [5]: it must be [T, H]. Pass a row per token"),
    (
        "permute",
        (X, ROWS.long(), 6),
        "rows_TK.dtype = int64: it must be int32. Pass the rows of dispatch_map, or convert it with rows_TK.int()",
    ),
    ("permute", (X, ROWS[0], 6), "rows_TK.shape = [2]: it must be [T, K_top]. Pass the rows of dispatch_map"),
    (
        "permute",
        (X[:2], ROWS, 6),
        "rows_TK.shape = [3, 2]: it must be [T, K_top] with T = 2, as x_TH has it. Pass the rows of the same tokens",
    ),
    (
        "permute",
        (X, ROWS, -1),
        "num_rows = -1: it must be in 0..2147483647. Pass the sum of dispatch_map's tokens_S, or any larger number",
    ),
    (
        "unpermute",
        (Y.long(), ROWS, None),
        "y_NH.dtype = int64: it must be float16, bfloat16, float32 or float64. Convert it with y_NH.float()",
    ),
    ("unpermute", (Y[0], ROWS, None), "y_NH.shape = [5]: it must be [N, H]. Pass the permuted rows"),
    (
        "unpermute",
        (Y, ROWS, WEIGHTS.half()),
        "weights_TK.dtype = float16: it must be float32, or float32 as y_NH is. Convert it with weights_TK.float()",
    ),
    (
        "unpermute",
        (Y, ROWS, WEIGHTS.t()),
        "weights_TK.shape = [2, 3]: it must be [3, 2], as rows_TK has it. Pass a weight per choice",
    ),
    (
        "unpermute_backward",
        (X.half(), Y, ROWS, WEIGHTS),
        "grad_TH.dtype = float16: it must be float32, as y_NH is. Convert it with grad_TH.to(y_NH.dtype)",
    ),
    (
        "unpermute_backward",
        (X[:2], Y, ROWS, WEIGHTS),
        "grad_TH.shape = [2, 5]: it must be [T, H] = [3, 5], as rows_TK and y_NH have it. "
        "Pass the gradient of unpermute's result",
    ),
]


@pytest.mark.parametrize(("name", "args", "text"), ERRORS)
def test_errors_read_the_same_whatever_serves_the_op(name: str, args: tuple[object, ...], text: str) -> None:
    functions: list[Callable[..., object]] = [getattr(KERNELS, name), getattr(reference, name)]
    for function in functions:
        with pytest.raises(RuntimeError) as caught:
            function(*args)
        assert str(caught.value) == text


OTHER_DTYPES = (  # those that torch's stable interface passes on
    "bool uint8 int8 int16 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex32 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
).split()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_a_dtype_reads_as_python_spells_it(dtype: str) -> None:
    ids = torch.empty(2, 2, dtype=getattr(torch, dtype))
    for function in (KERNELS.dispatch_map, reference.dispatch_map):
        with pytest.raises(RuntimeError) as caught:
            function(ids, TABLE, 4)
        assert str(caught.value) == f"ids_TK.dtype = {dtype}: {NOT_INT} ids_TK.long()"


@pytest.mark.parametrize("num_choices", [0, 2])
def test_rows_without_elements(num_choices: int) -> None:
    """H = 0, which leaves no memory to clear: forward, and backward with weights."""
    rows_TK = torch.arange(3 * num_choices, dtype=torch.int32).view(3, num_choices)
    assert ops.permute(torch.ones(3, 0), rows_TK, 8).shape == (8, 0)
    y_NH, weights_TK = torch.ones(8, 0, requires_grad=True), torch.ones(3, num_choices, requires_grad=True)
    ops.unpermute(y_NH, rows_TK, weights_TK).sum().backward()
    assert y_NH.grad is not None
    assert y_NH.grad.shape == (8, 0)
    assert weights_TK.grad is not None
    assert weights_TK.grad.tolist() == [[0.0] * num_choices] * 3


def test_another_device_is_refused() -> None:
    """By the twin; the CUDA glue says the same, with the devices that it sees."""
    with pytest.raises(RuntimeError) as caught:
        checks.check_dispatch_map(IDS, TABLE.to("meta"), 4)
    assert str(caught.value) == (
        "slot_of_E.device = meta: it must be cpu, as ids_TK has it. Convert it with slot_of_E.to(ids_TK.device)"
    )


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """Through offsets alone: two rows, far apart, of one byte an element."""
    hidden = 2**30 + 16
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("less than 12 GiB of free memory")
    x_TH = torch.ones(1, hidden, dtype=torch.uint8)
    y_NH = ops.permute(x_TH, torch.tensor([[2]], dtype=torch.int32), 3)
    assert y_NH[2, 0] == 1
    assert y_NH[2, -1] == 1
    assert y_NH[1, -1] == 0
