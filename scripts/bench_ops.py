#!/usr/bin/env python3
"""Times the dispatch ops against their twins, Megatron's, TransformerEngine's, and the bytes that they have to move.

    python scripts/bench_ops.py                                       on the CPU, small sizes
    python scripts/bench_ops.py --device cuda                         T=8192 and 16384, H=4096 and 7168, k=2 and 8, bf16
    python scripts/bench_ops.py --device cuda --nominal-gbs 4800      also against the data sheet

On the CPU the process keeps the pages of freed tensors, as CPU ranks do; with --fresh-pages malloc is left as it is.
CPU times are the thread's, so that a busy machine shows little in them. An op's bytes are the compulsory ones: every
row read once and written once, maps and weights included. The roof is a copy measured in the same run, into memory that
is allocated already; 100% is as fast as that copy, for the same bytes read and written. A time is the median of
--repeats calls after --warm-up. Results are checked against the twin first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_smartmoe import ops
from megatron_smartmoe.adapter.allocator import keep_pages
from megatron_smartmoe.ops import reference

KERNELS: Any = torch.ops.smartmoe
TRITON_PERMUTATION = "transformer_engine.pytorch.triton.permutation"
SOURCES = 8  # ranks whose rows are sorted by slot
CPU_SIZES: dict[str, list[int]] = {"tokens": [4096], "hidden": [1024], "top_k": [2, 8]}
GPU_SIZES: dict[str, list[int]] = {"tokens": [8192, 16384], "hidden": [4096, 7168], "top_k": [2, 8]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of one layer's dispatch.

    Attributes:
        ids_TK: experts that the tokens chose.
        slot_of_E: the slot of each expert, a random permutation.
        rows_TK: result of dispatch_map.
        x_TH: a row per token.
        y_NH: rows sorted by slot.
        weights_TK: a float32 factor per choice.
        inner_NG: gate and linear part of each row, 2 H columns: an expert as wide inside as outside.
        routing_map_TE: the choices as the router's map.
        probs_TE: the router's probabilities.
        counts_QS: rows from each of 8 sources for each slot.
    """

    ids_TK: Tensor
    slot_of_E: Tensor
    rows_TK: Tensor
    x_TH: Tensor
    y_NH: Tensor
    weights_TK: Tensor
    inner_NG: Tensor
    routing_map_TE: Tensor
    probs_TE: Tensor
    counts_QS: Tensor

    def num_bytes(self, op: str) -> int:
        """Bytes that the op has to read and write."""
        choices, tokens = self.ids_TK.numel(), self.x_TH.nbytes
        rows = self.y_NH.nbytes
        return {
            "dispatch_map": self.ids_TK.nbytes + 4 * choices,
            "permute": tokens + rows + 4 * choices,
            "unpermute": tokens + rows + 4 * choices,
            "unpermute, weighted": tokens + rows + 8 * choices,
            "unpermute backward": tokens + 2 * rows + 12 * choices,
            "permute, with weights": tokens + rows + 12 * choices,
            "chosen experts": self.routing_map_TE.nbytes + 12 * choices,
            "chunk rows": self.counts_QS.nbytes + 8 * choices,
            "swiglu": 3 * rows + 4 * choices,
            "swiglu backward": 5 * rows + 8 * choices,
        }[op]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measurement: op, implementation, size, time in microseconds, bandwidth, and its fraction of the roof."""

    op: str
    by: str
    tokens: int
    hidden: int
    top_k: int
    time_us: float
    gbs: float
    roof: float


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str, repeats: int, warm_up: int) -> None:
        self.on_gpu, self.repeats, self.warm_up = device == "cuda", repeats, warm_up

    def median_us(self, call: Callable[[], object]) -> float:
        """Median time of a call; on a GPU by events around it, without the host's part once the queue is full."""
        for _ in range(self.warm_up):
            call()
        return statistics.median(self._gpu_us(call) if self.on_gpu else self._cpu_us(call))

    def _cpu_us(self, call: Callable[[], object]) -> Iterator[float]:
        for _ in range(self.repeats):
            start_ns = time.thread_time_ns()
            call()
            yield (time.thread_time_ns() - start_ns) / 1000

    def _gpu_us(self, call: Callable[[], object]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1000 for begin, end in events]


def make_case(tokens: int, hidden: int, top_k: int, experts: int, dtype: torch.dtype, device: str) -> Case:
    """Uniformly random choices of distinct experts."""
    ids = torch.rand(tokens, experts, device=device).topk(top_k, dim=1).indices
    slot_of = torch.randperm(experts, device=device)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool, device=device).scatter_(1, ids, True)
    sources = torch.arange(tokens * top_k, device=device) % SOURCES
    counts = torch.zeros(SOURCES * experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, sources * experts + ids.flatten(), torch.ones_like(sources))
    rows_TK, _ = ops.dispatch_map(ids, slot_of, experts)
    return Case(
        ids_TK=ids,
        slot_of_E=slot_of,
        rows_TK=rows_TK,
        x_TH=torch.randn(tokens, hidden, device=device).to(dtype),
        y_NH=torch.randn(tokens * top_k, hidden, device=device).to(dtype),
        weights_TK=torch.rand(tokens, top_k, device=device),
        inner_NG=torch.randn(tokens * top_k, 2 * hidden, device=device).to(dtype),
        routing_map_TE=routing_map,
        probs_TE=torch.rand(tokens, experts, device=device),
        counts_QS=counts.view(SOURCES, experts),
    )


def ours(case: Case, backend: Any) -> dict[str, Callable[[], object]]:
    """Calls of the ops: `backend` has the kernels or the twins."""
    experts = case.slot_of_E.numel()
    rows, num_rows, weights = case.rows_TK, case.y_NH.shape[0], case.weights_TK
    return {
        "dispatch_map": lambda: backend.dispatch_map(case.ids_TK, case.slot_of_E, experts),
        "permute": lambda: backend.permute(case.x_TH, rows, num_rows),
        "unpermute": lambda: backend.unpermute(case.y_NH, rows, None),
        "unpermute, weighted": lambda: backend.unpermute(case.y_NH, rows, weights),
        "unpermute backward": lambda: backend.unpermute_backward(case.x_TH, case.y_NH, rows, weights),
        "permute, with weights": lambda: backend.permute_weighted(case.x_TH, weights, rows, num_rows),
        "chosen experts": lambda: backend.chosen_experts(case.routing_map_TE, case.probs_TE, rows.shape[1]),
        "chunk rows": lambda: backend.chunk_rows(case.counts_QS, num_rows),
        "swiglu": lambda: backend.swiglu(case.inner_NG, weights.flatten()),
        "swiglu backward": lambda: backend.swiglu_backward(case.y_NH, case.inner_NG, weights.flatten()),
    }


def masks(case: Case) -> tuple[Tensor, Tensor]:
    """Routing map and probabilities [T, slots] as Megatron and TransformerEngine want them, made beforehand."""
    slots = case.slot_of_E[case.ids_TK]
    routing_map = torch.zeros(len(slots), case.slot_of_E.numel(), dtype=torch.bool, device=slots.device)
    probs = torch.zeros(routing_map.shape, device=slots.device).scatter_(1, slots, case.weights_TK)
    return routing_map.scatter_(1, slots, True), probs


def megatron(case: Case, moe_utils: ModuleType) -> dict[str, Callable[[], object]]:
    """Calls of Megatron's ops without fusion. Its permute includes the map; its backward is autograd's alone."""
    routing_map, probs = masks(case)
    shape, num_rows = case.x_TH.shape, case.y_NH.shape[0]
    order = moe_utils.permute(case.x_TH, routing_map, num_out_tokens=num_rows)[2]
    y_NH, grad_probs = case.y_NH.clone().requires_grad_(), probs.clone().requires_grad_()
    weighted = moe_utils.unpermute(y_NH, order, shape, probs=grad_probs, routing_map=routing_map)
    grad = case.x_TH.to(weighted.dtype)
    return {
        "permute": lambda: moe_utils.permute(case.x_TH, routing_map, num_out_tokens=num_rows),
        "unpermute": lambda: moe_utils.unpermute(case.y_NH, order, shape),
        "unpermute, weighted": lambda: moe_utils.unpermute(
            case.y_NH, order, shape, probs=probs, routing_map=routing_map
        ),
        "unpermute backward": lambda: torch.autograd.grad(weighted, (y_NH, grad_probs), grad, retain_graph=True),
    }


def transformer_engine(case: Case, te: ModuleType) -> dict[str, Callable[[], object]]:
    """Calls of TransformerEngine's Triton kernels; make_row_id_map is its dispatch_map."""
    routing_map, probs = masks(case)
    (tokens, experts), (num_rows, hidden) = routing_map.shape, case.y_NH.shape
    row_map = te.make_row_id_map(routing_map, tokens, experts)
    return {
        "dispatch_map": lambda: te.make_row_id_map(routing_map, tokens, experts),
        "permute": lambda: te.permute_with_mask_map(
            case.x_TH, row_map, None, None, None, tokens, experts, num_rows, hidden, 0
        ),
        "unpermute": lambda: te.unpermute_with_mask_map(case.y_NH, row_map, None, None, None, tokens, experts, hidden),
        "unpermute, weighted": lambda: te.unpermute_with_mask_map(
            case.y_NH, row_map, probs, None, None, tokens, experts, hidden
        ),
        "unpermute backward": lambda: te.unpermute_with_mask_map_bwd_with_merging_probs(
            case.x_TH, row_map, case.y_NH, probs, None, tokens, experts, num_rows, hidden
        ),
    }


def contenders(case: Case, with_triton: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """The implementations that can be imported here."""
    found = {"smartmoe": ours(case, KERNELS), "twin": ours(case, reference)}
    for name, module, make in (
        ("megatron", "megatron.core.transformer.moe.moe_utils", megatron),
        ("transformer engine", TRITON_PERMUTATION, transformer_engine),
    ):
        if name == "transformer engine" and not with_triton:
            continue
        try:
            found[name] = make(case, importlib.import_module(module))
        except ImportError as error:
            print(f"{name}: not measured, {error}", file=sys.stderr)
    return found


def check(case: Case) -> None:
    """Ends the program when kernels and twins disagree by more than the order of a sum and a fused multiply-add."""
    for (op, call), twin in zip(ours(case, KERNELS).items(), ours(case, reference).values(), strict=True):
        exact = op in ("dispatch_map", "permute", "permute, with weights", "chosen experts", "chunk rows")
        tolerance = 0.0 if exact else 2e-2 if case.x_TH.itemsize == 2 else 1e-4
        try:
            torch.testing.assert_close(call(), twin(), rtol=tolerance, atol=tolerance * 10)
        except AssertionError as error:
            sys.exit(f"{op} and its twin disagree: {error}")


def copy_gbs(device: str, num_bytes: int, clock: Clock) -> float:
    """Bandwidth of a copy in GB/s, counting bytes read and written."""
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.median_us(lambda: target.copy_(source)) / 1000


def device_name(device: str) -> str:
    """The GPU, or the processor as Linux names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def parse() -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(description="Time the dispatch ops against their peers and the byte roofline.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device to run on (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the rows (default: float32 on the CPU, bfloat16 on a GPU)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="T, tokens of a micro-batch")
    parser.add_argument("--hidden", type=int, nargs="+", help="H, elements of a row")
    parser.add_argument("--top-k", type=int, nargs="+", help="choices of a token")
    parser.add_argument("--experts", type=int, default=64, help="experts, and as many slots")
    parser.add_argument("--fresh-pages", action="store_true", help="give every freed tensor's pages back to the kernel")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per op")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed calls before them")
    parser.add_argument(
        "--nominal-gbs", type=float, help="memory bandwidth of the data sheet in GB/s, for one more column"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the choices and rows")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    args = parser.parse_args()
    for name, values in (GPU_SIZES if args.device == "cuda" else CPU_SIZES).items():
        setattr(args, name, getattr(args, name) or values)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def measure(args: argparse.Namespace, clock: Clock, roof_gbs: float) -> Iterator[Line]:
    """Yields the measurements, size by size."""
    sizes = [(t, h, k) for t in args.tokens for h in args.hidden for k in args.top_k]
    for tokens, hidden, top_k in sizes:
        case = make_case(tokens, hidden, top_k, args.experts, getattr(torch, args.dtype), args.device)
        check(case)
        implementations = contenders(case, with_triton=args.device == "cuda")
        for op in implementations["smartmoe"]:
            for by, calls in implementations.items():
                if op not in calls:
                    continue
                time_us = clock.median_us(calls[op])
                gbs = case.num_bytes(op) / time_us / 1000
                size = {"tokens": tokens, "hidden": hidden, "top_k": top_k}
                yield Line(op=op, by=by, **size, time_us=time_us, gbs=gbs, roof=gbs / roof_gbs)


def main() -> None:
    """Prints the table."""
    args = parse()
    if args.device == "cpu" and not args.fresh_pages:
        keep_pages(os.environ)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    clock = Clock(args.device, args.repeats, args.warm_up)
    roof_gbs = copy_gbs(args.device, 2**32 if args.device == "cuda" else 2**27, clock)
    machine = f"{device_name(args.device)}{'' if args.device == 'cuda' else ', one core'}"
    print(f"{machine}; torch {torch.__version__}; ops: {ops.backend()}; {args.dtype}; copy {roof_gbs:.1f} GB/s")
    nominal = args.nominal_gbs
    print(
        f"{'T':>6} {'H':>5} {'k':>2}  {'op':<22} {'by':<18} {'us':>10} {'GB/s':>8} {'of copy':>8}"
        + (f" {'nominal':>8}" if nominal else "")
    )
    lines = []
    for line in measure(args, clock, roof_gbs):
        lines.append(line)
        print(
            f"{line.tokens:>6} {line.hidden:>5} {line.top_k:>2}  {line.op:<22} {line.by:<18} {line.time_us:>10.1f} "
            f"{line.gbs:>8.2f} {line.roof:>8.1%}" + (f" {line.gbs / nominal:>8.1%}" if nominal else ""),
            flush=True,
        )
    if args.json:
        report = {"machine": machine, "torch": torch.__version__, "dtype": args.dtype, "copy_gbs": roof_gbs}
        args.json.write_text(json.dumps({**report, "lines": [asdict(line) for line in lines]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
