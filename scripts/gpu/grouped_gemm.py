"""What the grouped GEMMs do on this device: empty groups, waits of the host, and speed against a GEMM each.

Torch's and Triton's: which of them multiplies depends on the type and the GPU, and Triton's adds weight gradients to
float32 sums everywhere.

    python3 -m scripts.gpu.grouped_gemm [--device cuda|cpu]

Exit status 1 if a gradient is wrong: that of an expert without rows must be zero, also in memory that held NaN. Waits
of the host are reported, by torch's own detector; there is none on the CPU, and its sizes are small.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from scripts.gpu.report import report

COUNTS = ([300, 0, 77, 0], [0, 0, 0, 5], [0, 0, 0, 0], [1, 2, 3, 4])
SIZES = {  # experts, rows of each, columns, columns of the output
    "cuda": ((8, 4096, 4096, 28672), (8, 4096, 7168, 4096), (32, 1024, 7168, 4096), (64, 256, 2048, 1536)),
    "cpu": ((4, 32, 64, 128),),
}


def wrong_gradients(counts: list[int], dtype: torch.dtype, device: str) -> str:
    """What is wrong with the weight gradients of one grouped GEMM; empty if nothing is."""
    from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear

    num_slots, columns, outputs = len(counts), 512, 256
    rows = torch.randn(sum(counts), columns, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(num_slots, outputs, columns, device=device, dtype=dtype, requires_grad=True)
    dirt = [torch.full_like(weight, float("nan")) for _ in range(4)]
    del dirt  # the gradient may get this memory
    output = grouped_linear(rows, weight, Groups.of(rows, torch.tensor(counts)))
    gradient = torch.randn_like(output)
    output.backward(gradient)
    found = weight.grad
    if found is None:
        return "no gradient"
    start = 0
    for slot, count in enumerate(counts):
        part = slice(start, start + count)
        expected = gradient[part].float().t().mm(rows.detach()[part].float())
        start += count
        if count == 0 and not bool((found[slot] == 0).all()):
            return f"expert {slot} has no rows and a gradient of {float(found[slot].abs().max()):g}"
        if not torch.allclose(found[slot].float(), expected, rtol=2e-2, atol=0.5):
            return f"expert {slot} differs by {float((found[slot].float() - expected).abs().max()):g}"
    return ""


def wrong_sums(counts: list[int], device: str) -> str:
    """What is wrong with bfloat16 weight gradients that are added to float32 sums; empty if nothing is."""
    from megatron_smartmoe.ops.grouped_linear import Groups, add_weight_gradient

    rows = torch.randn(sum(counts), 512, device=device, dtype=torch.bfloat16)
    gradient = torch.randn(sum(counts), 256, device=device, dtype=torch.bfloat16)
    sums = torch.ones(len(counts), 256, 512, device=device)
    add_weight_gradient(sums, gradient, rows, Groups.of(rows, torch.tensor(counts)))
    for slot, (x, dy) in enumerate(zip(rows.split(counts), gradient.split(counts), strict=True)):
        difference = float((sums[slot] - 1 - dy.float().t().mm(x.float())).abs().max())
        if difference > 1e-3 * max(1, counts[slot]) ** 0.5:  # a rounding to bfloat16 would be seen
            return f"the sum of expert {slot} differs by {difference:g}"
    return ""


def host_waits(call: Callable[[], object]) -> int:
    """How many times a call makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def seconds(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Mean seconds of a call, after three."""
    for _ in range(3):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def measure_waits(dtype: torch.dtype) -> None:
    """Report the host's waits of one grouped GEMM, forward and backward."""
    from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear

    rows = torch.randn(64, 512, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 256, 512, device="cuda", dtype=dtype, requires_grad=True)
    groups, gradient = Groups.of(rows, torch.tensor([16] * 4)), torch.ones(64, 256, device="cuda", dtype=dtype)
    waits = host_waits(lambda: grouped_linear(rows, weight, groups).backward(gradient))
    report(f"host waits of one grouped GEMM, forward and backward, {dtype}".replace("torch.", ""), waits)


def _one_by_one(parts: Sequence[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    return [F.linear(rows, weight[slot]) for slot, rows in enumerate(parts)]


def measure_speed(device: str) -> None:
    """Report the grouped GEMMs' speed, and that of a GEMM for each expert, in the same run."""
    from megatron_smartmoe.ops.grouped_linear import Groups, add_weight_gradient, grouped_linear, weight_gradient

    for experts, rows, columns, outputs in SIZES[device]:
        x = torch.randn(experts * rows, columns, device=device, dtype=torch.bfloat16)
        weight = torch.randn(experts, outputs, columns, device=device, dtype=torch.bfloat16)
        groups, parts = Groups.of(x, torch.tensor([rows] * experts)), x.split(rows)
        flop = 2 * experts * rows * columns * outputs
        size = f"{experts} experts x {rows} rows, {columns} -> {outputs}, bf16"
        together = seconds(partial(grouped_linear, x, weight, groups), device)
        each = seconds(partial(_one_by_one, parts, weight), device)
        report(f"grouped GEMM, {size}", flop / together / 1e12, "TFLOP/s")
        report(f"a GEMM each, {size}", flop / each / 1e12, "TFLOP/s")
        gradient = torch.randn(experts * rows, outputs, device=device, dtype=torch.bfloat16)
        sums = torch.zeros(experts, outputs, columns, device=device)
        rounded = seconds(lambda: sums.add_(weight_gradient(gradient, x, weight, groups)), device)  # noqa: B023
        added = seconds(partial(add_weight_gradient, sums, gradient, x, groups), device)
        report(f"weight gradient, rounded, then added, {size}", flop / rounded / 1e12, "TFLOP/s")
        report(f"weight gradient added to float32 sums, {size}", flop / added / 1e12, "TFLOP/s")
        if device == "cuda" and groups.ends_S is not None:
            kernel = partial(torch.ops.smartmoe_triton.multiply, x, weight.transpose(1, 2), groups.ends_S)
            report(f"grouped GEMM in Triton, {size}", flop / seconds(kernel, device) / 1e12, "TFLOP/s")


def main() -> int:
    """Check and measure; 1 if a gradient is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device: str = parser.parse_args().device
    from megatron_smartmoe import ops
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device(device)
    print(torch.__version__, ops.backend(), flush=True)
    problems = []
    if device == "cuda":
        from megatron_smartmoe.ops.grouped_linear import triton_fault

        print(f"Triton: {triton_fault(torch.device('cuda', 0)) or 'works'}", flush=True)
    for counts in COUNTS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            problem = wrong_gradients(counts, dtype, device)
            print(f"weight gradients of {counts} rows, {dtype}: {problem or 'right'}".replace("torch.", ""), flush=True)
            problems += [problem] if problem else []
        problem = wrong_sums(counts, device)
        print(f"float32 sums of {counts} rows: {problem or 'right'}", flush=True)
        problems += [problem] if problem else []
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            measure_waits(dtype)
    measure_speed(device)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
