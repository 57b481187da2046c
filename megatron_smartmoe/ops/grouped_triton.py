"""A linear layer per group of rows as one Triton kernel, where torch's grouped GEMM has none.

torch multiplies float32 and float16 anywhere, and bfloat16 before Hopper and on consumer Blackwell, by a GEMM per group
behind a wait of the host. These kernels read where groups end on the device, so nobody waits, and a group costs no
launch. There are two: rows times their group's weight (the layer, and the gradient of its rows), and the gradient of
the weights, which may be added to float32 sums as it is made, as TransformerEngine and apex do: that one serves every
GPU, because torch's grouped GEMM rounds a bfloat16 gradient before anybody can add it.

Products are summed in float32, in one order: results repeat bit by bit. float32 is multiplied in full precision, or in
TF32 where torch is told to (`torch.backends.cuda.matmul.allow_tf32`).

Triton comes with torch's CUDA wheels. With TRITON_INTERPRET=1 the kernels run on the CPU, which the tests do.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# The kernels are Triton, a language of its own in Python's syntax; its compiler reads neither annotations nor defaults.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _find_group(tile, ends_S, num_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a tile of ROWS rows, the tile's first row, and the group's end; group num_groups is none."""
    groups = tl.arange(0, GROUPS)
    ends = tl.load(ends_S + groups, mask=groups < num_groups, other=0)
    begins = tl.load(ends_S + groups - 1, mask=(groups > 0) & (groups < num_groups), other=0)
    sizes = tl.where(groups < num_groups, ends - begins, 0)
    tiles = (sizes + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    here = groups == group
    first = tl.sum(tl.where(here, begins + (tile - (last - tiles)) * ROWS, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return group, first, end


@triton.jit
def _multiply_kernel(
    rows_NK,
    weight_SKM,
    out_NM,
    ends_S,
    num_groups,
    num_k,
    num_m,
    row_stride,
    weight_stride_s,
    weight_stride_k,
    weight_stride_m,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, first, end = _find_group(tl.program_id(1), ends_S, num_groups, ROWS, GROUPS)
    if group >= num_groups:  # there are as many tiles as any lengths of the groups could need
        return
    n = first + tl.arange(0, ROWS)
    m = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, K)
    rows = rows_NK + n[:, None].to(tl.int64) * row_stride + k[None, :]
    weights = weight_SKM + group.to(tl.int64) * weight_stride_s
    weights += k[:, None].to(tl.int64) * weight_stride_k + m[None, :].to(tl.int64) * weight_stride_m
    total = tl.zeros((ROWS, M), dtype=tl.float32)
    for begin in range(0, num_k, K):
        row = tl.load(rows, mask=(n < end)[:, None] & (k < num_k - begin)[None, :], other=0.0)
        weight = tl.load(weights, mask=(k < num_k - begin)[:, None] & (m < num_m)[None, :], other=0.0)
        total = tl.dot(row, weight, total, input_precision=PRECISION)
        rows += K
        weights += K * weight_stride_k
    out = out_NM + n[:, None].to(tl.int64) * num_m + m[None, :]
    tl.store(out, total.to(out_NM.dtype.element_ty), mask=(n < end)[:, None] & (m < num_m)[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad_NM,
    rows_NK,
    out_SMK,
    ends_S,
    num_m,
    num_k,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    group = tl.program_id(1)
    tiles_k = tl.cdiv(num_k, K)
    m = (tl.program_id(0) // tiles_k) * M + tl.arange(0, M)
    k = (tl.program_id(0) % tiles_k) * K + tl.arange(0, K)
    first = tl.load(ends_S + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_S + group)
    if ADDS and first == end:
        return
    n = first + tl.arange(0, ROWS)
    grads = grad_NM + n[None, :].to(tl.int64) * num_m + m[:, None]
    rows = rows_NK + n[:, None].to(tl.int64) * num_k + k[None, :]
    total = tl.zeros((M, K), dtype=tl.float32)
    for begin in range(first, end, ROWS):
        left = tl.arange(0, ROWS) < end - begin
        grad = tl.load(grads, mask=left[None, :] & (m < num_m)[:, None], other=0.0)
        row = tl.load(rows, mask=left[:, None] & (k < num_k)[None, :], other=0.0)
        total = tl.dot(grad, row, total, input_precision=PRECISION)
        grads += ROWS * num_m
        rows += ROWS * num_k
    inside = (m < num_m)[:, None] & (k < num_k)[None, :]
    out = out_SMK + group.to(tl.int64) * num_m * num_k + m[:, None].to(tl.int64) * num_k + k[None, :]
    if ADDS:
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total.to(out_SMK.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How much one program computes: `rows` x `columns` of the result, `depth` of the sum a step, by `warps` warps."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Options of Triton's launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# Estimates, not measured on a GPU. Three stages of the 16-bit tiles take 96 KiB of shared memory: of the 99 KiB that
# compute capability 8.6, 8.9 and 12.0 have.
_HALF = Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
_FLOAT = Tiles(rows=64, columns=64, depth=32, warps=4, stages=3)


def tiles_of(dtype: torch.dtype) -> Tiles:
    """The tiles of a type on a GPU."""
    return _FLOAT if dtype == torch.float32 else _HALF


def multiply(rows_NK: Tensor, weight_SKM: Tensor, ends_S: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """Rows of group s times `weight_SKM[s]`, `[N, M]`.

    Args:
        rows_NK: rows sorted by group.
        weight_SKM: a weight per group, of any strides.
        ends_S: where each group's rows end, int32 on the device of the rows.
        tiles: the size of a program's work; None for that of the type.
    """
    tiles = tiles or tiles_of(rows_NK.dtype)
    rows_NK = rows_NK if rows_NK.stride(1) == 1 else rows_NK.contiguous()
    num_rows, num_k = rows_NK.shape
    num_groups, _, num_m = weight_SKM.shape
    out_NM = rows_NK.new_empty(num_rows, num_m)
    if out_NM.numel() == 0:
        return out_NM
    grid = (triton.cdiv(num_m, tiles.columns), triton.cdiv(num_rows, tiles.rows) + num_groups)
    _multiply_kernel[grid](
        rows_NK,
        weight_SKM,
        out_NM,
        ends_S,
        num_groups,
        num_k,
        num_m,
        rows_NK.stride(0),
        *weight_SKM.stride(),
        PRECISION=_precision(),
        ROWS=tiles.rows,
        K=tiles.depth,
        M=tiles.columns,
        GROUPS=triton.next_power_of_2(num_groups),
        **tiles.launch,
    )
    return out_NM


def weight_gradient(
    grad_NM: Tensor, rows_NK: Tensor, ends_S: Tensor, out_SMK: Tensor, *, adds: bool, tiles: Tiles | None = None
) -> None:
    """Write to `out_SMK` for each group its gradient's rows, transposed, times its rows, or add it.

    Args:
        grad_NM: gradients of the rows' products, sorted by group.
        rows_NK: the rows.
        ends_S: where each group's rows end, int32 on the device of the rows.
        out_SMK: contiguous, of any floating type. A group without rows gets zeros, or nothing is added to it.
        adds: whether to add; a sum is rounded once, to the type of `out_SMK`.
        tiles: the size of a program's work; None for that of the type.
    """
    assert out_SMK.is_contiguous(), "the gradient of the weights must be contiguous"
    tiles = tiles or tiles_of(rows_NK.dtype)
    num_groups, num_m, num_k = out_SMK.shape
    if out_SMK.numel() == 0:
        return
    grid = (triton.cdiv(num_m, tiles.rows) * triton.cdiv(num_k, tiles.columns), num_groups)
    _weight_gradient_kernel[grid](
        grad_NM.contiguous(),
        rows_NK.contiguous(),
        out_SMK,
        ends_S,
        num_m,
        num_k,
        ADDS=adds,
        PRECISION=_precision(),
        ROWS=tiles.depth,
        M=tiles.rows,
        K=tiles.columns,
        **tiles.launch,
    )


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def try_kernels(device: torch.device) -> None:
    """Compile and run the kernels on one row; whatever is missing raises an error."""
    row, weight = torch.zeros(1, 16, device=device), torch.zeros(1, 16, 16, device=device)
    ends = torch.ones(1, dtype=torch.int32, device=device)
    weight_gradient(multiply(row, weight, ends), row, ends, weight, adds=True)
