"""One MoE layer under torch's profiler, forward and backward: launches, busy and idle time, the gap after the counts.

    python3 -m scripts.gpu.trace_layer [--device cuda|cpu]

The layer is that of one rank of 8 expert-parallel ranks, of which there is no other: every exchange is a copy on the
device, and all ranks route as this one does. So what is measured is the host's and the device's work of a layer without
its wire: how many kernels it launches, how long the device has nothing to do, and for how long after the counts have
come to the host, where the host plans. Megatron's own layer, with its all-to-all dispatcher and a GEMM per expert, is
measured in the same run. On the CPU sizes are small, and there are no kernels to count.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from scripts.gpu.report import report
from tests.support.meta_layer import Case, build, join

LAYERS = {
    "stock": Case(),
    "homes": Case(),
    "4 chunks": Case(degree=4),
    "exact replicas": Case(replicas=True),
    "exact replicas, 4 chunks": Case(replicas=True, degree=4),
}
SIZES = {  # tokens, experts, hidden, ffn, timed passes
    "cuda": (4096, 64, 4096, 1536, 20),
    "cpu": (64, 16, 64, 32, 2),
}


def exchange_on_the_device() -> None:
    """Let collectives be copies: what the others send is what this rank sends."""
    from tests.support.one_gpu import Work, replace_everywhere

    def done(async_op: bool) -> Work | None:
        work = Work()
        work._issued.set()
        return work if async_op else None

    def all_gather_into_tensor(
        output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
    ) -> Work | None:
        parts = output_tensor.view(-1, input_tensor.numel())
        parts.copy_(input_tensor.reshape(1, -1).expand(len(parts), -1))
        return done(async_op)

    def all_to_all_single(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Work | None:
        both = min(len(output), len(input))
        output[:both].copy_(input[:both])
        output[both:].zero_()
        return done(async_op)

    def all_reduce(tensor: Any, op: Any = None, group: Any = None, async_op: bool = False) -> Work | None:
        return done(async_op)

    def batch_isend_irecv(operations: list[Any]) -> list[Work]:
        return [work] if (work := done(True)) is not None else []

    replace_everywhere(
        {
            "all_gather_into_tensor": all_gather_into_tensor,
            "_all_gather_base": all_gather_into_tensor,
            "all_to_all_single": all_to_all_single,
            "all_reduce": all_reduce,
            "batch_isend_irecv": batch_isend_irecv,
        }
    )


def one_pass(layer: Any, rows: torch.Tensor, gradient: torch.Tensor) -> None:
    """Forward and backward."""
    layer(rows)[0].backward(gradient)


def kernels_of(profile: Any) -> list[tuple[float, float, str]]:
    """Begin, end (microseconds) and name of everything that ran on the device, in order."""
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in on_device)


def busy_us(kernels: list[tuple[float, float, str]]) -> float:
    """Microseconds in which the device did something."""
    total = until = 0.0
    for begin, end, _ in kernels:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def gap_after_counts_us(kernels: list[tuple[float, float, str]]) -> float:
    """Microseconds from the first copy to the host to the next kernel: the device waits for the host's decision."""
    copies = [index for index, (_, _, name) in enumerate(kernels) if "DtoH" in name]
    if not copies:
        return 0.0
    ended = kernels[copies[0]][1]
    return min((begin - ended for begin, _, name in kernels if begin >= ended and "DtoH" not in name), default=0.0)


def trace(name: str, device: str) -> None:
    """Measure one layer and report it."""
    tokens, experts, hidden, ffn, passes = SIZES[device]
    sizes = {"num_moe_experts": experts, "hidden_size": hidden, "moe_ffn_hidden_size": ffn, "ffn_hidden_size": ffn}
    case = Case(degree=LAYERS[name].degree, replicas=LAYERS[name].replicas, options=sizes)
    layer, config = build(case, torch.device(device), stock=name == "stock")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
    rows = torch.randn(tokens, 1, hidden, device=device, dtype=config.params_dtype, requires_grad=True)
    gradient = torch.randn_like(rows)
    for _ in range(3):
        one_pass(layer, rows, gradient)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    for _ in range(passes):
        one_pass(layer, rows, gradient)
    synchronize()
    report(f"{name}: forward and backward", (time.perf_counter() - begin) / passes * 1e3, "ms")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        one_pass(layer, rows, gradient)
        synchronize()
    kernels = kernels_of(profile)
    if device == "cpu":
        return
    assert kernels, "the profiler saw no kernel"
    wall = max(end for _, end, _ in kernels) - kernels[0][0]
    report(f"{name}: kernels and copies", len(kernels))
    report(f"{name}: device busy", 100 * busy_us(kernels) / wall, "%")
    report(f"{name}: device waits after the counts", gap_after_counts_us(kernels), "us")


def main() -> int:
    """Trace every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device: str = parser.parse_args().device
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device(device)
    import megatron.core.transformer.moe.moe_layer  # noqa: F401  # its names are replaced below

    join()
    exchange_on_the_device()
    for name in LAYERS:
        trace(name, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
