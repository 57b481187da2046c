"""Triton's grouped GEMMs against the loop over groups: `test_grouped_triton` runs this under Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smartmoe import ops  # noqa: F401  # registers the ops
from megatron_smartmoe.ops import grouped_triton
from megatron_smartmoe.ops.grouped_linear import Groups, add_weight_gradient, multiply_groups, weight_gradient
from tests.support import triton_interpreter  # noqa: F401  # mends the interpreter

TILES = grouped_triton.Tiles(rows=16, columns=32, depth=16, warps=4, stages=1)
COUNTS = ((20, 0, 29, 1), (0, 0, 0), (3,), (0, 5, 16, 0, 17))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative; half of them are roundings


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


def check(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """All that a layer and its backward pass multiply."""
    groups, num_k, num_m = len(counts), 40, 24
    loop, ends_S = Groups.of(torch.empty(0), torch.tensor(counts)), torch.tensor(counts).cumsum(0).int()
    rows_NK = torch.randn(sum(counts), num_k).to(dtype)
    weight_SMK, grad_NM = torch.randn(groups, num_m, num_k).to(dtype), torch.randn(sum(counts), num_m).to(dtype)
    for left, weight in ((rows_NK, weight_SMK.transpose(1, 2)), (grad_NM, weight_SMK)):
        found = grouped_triton.multiply(left, weight, ends_S, tiles=TILES)
        assert_near(found, multiply_groups(left, weight, loop), dtype)
    expected = weight_gradient(grad_NM, rows_NK, weight_SMK, loop)
    written = torch.full_like(expected, float("nan"))
    grouped_triton.weight_gradient(grad_NM, rows_NK, ends_S, written, adds=False, tiles=TILES)
    assert_near(written, expected, dtype)
    assert not written[[count == 0 for count in counts]].any()
    start = torch.randn(expected.shape)
    added, twin = start.clone(), start.clone()
    grouped_triton.weight_gradient(grad_NM, rows_NK, ends_S, added, adds=True, tiles=TILES)
    add_weight_gradient(twin, grad_NM, rows_NK, loop)
    assert_near(added, twin, torch.float32)  # nothing was rounded to the type of the rows


def main() -> None:
    seed = torch.seed()
    for counts in COUNTS:
        for dtype in TOLERANCE:
            print("seed", seed, counts, dtype, flush=True)
            check(counts, dtype)
    # as torch ops, with the tiles of a GPU
    rows, weight, ends = torch.randn(5, 8), torch.randn(2, 4, 8), torch.tensor([2, 5], dtype=torch.int32)
    kernels = torch.ops.smartmoe_triton
    product = kernels.multiply(rows, weight.transpose(1, 2), ends)
    assert_near(product, torch.cat([rows[:2] @ weight[0].t(), rows[2:] @ weight[1].t()]), torch.float32)
    gradient = kernels.weight_gradient(product, rows, ends)
    kernels.add_weight_gradient(gradient, product, rows, ends)
    assert_near(gradient[1], 2 * product[2:].t() @ rows[2:], torch.float32)


if __name__ == "__main__":
    main()
