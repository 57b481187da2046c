"""Measure a machine: matrix products of experts, copies, collectives. Every rank calls `measure`, at the same time.

Method. Before each repeat the ranks meet in a barrier, so that ranks that share cores, memory or a network card slow
each other down as they do in training. A repeat takes as long as its slowest rank, as a layer does, and a point is the
median of its repeats. The points of a series take turns: a moment in which the machine does something else then falls
on one repeat of all points, not on all repeats of one. Short operations are called many times in a row (`TURN_S`), so
that neither the clock's resolution nor the barrier shows. On a GPU, CUDA events measure from the first kernel to the
last, gaps between launches included, as in training; every point is called untimed first.

CPU ranks sleep until a message arrives and return late to cores that others use, so that a collective between matrix
products takes two to three times as long as one of many in a row. CPU collectives are therefore measured between
products, whose time alone, measured in turns with them, is subtracted. A GPU's stream has no scheduler in between.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_smartmoe.calibrate.measurement import COLLECTIVES, MachineMeasurement, Point, Series
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.ops.grouped_linear import Groups, grouped_linear

TURN_S = 10e-3  # least seconds of one repeat
CALLS_BETWEEN_PRODUCTS = 8  # least calls of one repeat, since products vary by more than a short collective takes
MOST_CALLS = 1000  # calls of one repeat
LEAST_S = 1e-7  # seconds of a collective whose measured time is below that of the product before it
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure: a rank's experts, tokens per expert, bytes of collectives and of copies in memory."""

    expert: ExpertShape
    num_experts: int
    tokens: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    copy_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One point: `call` moves or computes `units`; `share` of its time is counted (one expert of several)."""

    units: float
    call: Callable[[], object]
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Device, process groups and repeats of the measurements.

    Attributes:
        device: device of this rank.
        dtype: type of weights, activations and messages.
        world: all ranks; they measure at the same time.
        links: process group of this rank for each link (`intra`, `inter`, levels); absent where the rank would be alone
            in it.
        nodes: number of machines.
        levels: nodes of one domain by level above the nodes, the smallest first.
        repeats: repeats of each point.
        report: called with the name of each measurement before it starts.
    """

    device: torch.device
    dtype: torch.dtype
    world: dist.ProcessGroup
    links: dict[str, dist.ProcessGroup]
    nodes: int
    repeats: int
    report: Callable[[str], object] = field(default=lambda text: None)
    levels: Mapping[str, int] = field(default_factory=dict)

    def series(self, tasks: Sequence[Task], least_calls: int = 1) -> Series:
        """Time every task, with at least `least_calls` calls in a repeat; collective."""
        # Step 1: how many calls of each task fill a repeat, the same on all ranks.
        calls = []
        for task in tasks:
            task.call()  # allocates, connects, chooses kernels
            once_s = self._slowest([self._turn(task.call, 1)])[0]
            calls.append(max(least_calls, min(MOST_CALLS, math.ceil(TURN_S / max(once_s, 1e-9)))))
        # Step 2: the tasks take turns, and each repeat counts its slowest rank.
        turns = [
            [self._turn(task.call, number) / number for task, number in zip(tasks, calls, strict=True)]
            for _ in range(self.repeats)
        ]
        return Series(
            points=tuple(_point(task, self._slowest([turn[at] for turn in turns])) for at, task in enumerate(tasks))
        )

    def _turn(self, call: Callable[[], object], calls: int) -> float:
        """Seconds of `calls` calls on this rank, after a barrier."""
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.world)
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - begin

    def _slowest(self, seconds: list[float]) -> list[float]:
        """The slowest rank's seconds of each repeat, the same on all ranks."""
        times = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self.world)
        found: list[float] = times.tolist()
        return found


def bench_of_job(
    device: torch.device,
    dtype: torch.dtype,
    per_node: int,
    repeats: int,
    report: Callable[[str], object] = lambda text: None,
    levels: Mapping[str, int] | None = None,
) -> Bench:
    """Make the process groups: the ranks of each node and, across nodes, the ranks with the same local rank.

    All groups of a kind measure at the same time, so that the GPUs of a node share its network card as in training.
    With levels above the nodes, `inter` is among the nodes of a smallest domain, and each level among the ranks that
    have the same place in its domains, those of one domain of the next level.

    Args:
        device: device of this rank.
        dtype: type of weights, activations and messages.
        per_node: ranks of each node.
        repeats: repeats of each point.
        report: called with the name of each measurement before it starts.
        levels: nodes of one domain by level, the smallest first.

    Raises:
        ConfigError: nodes with unequal numbers of ranks, or nodes that fill no whole domains.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % per_node:
        rule = f"must divide the {world_size} ranks: every node needs the same number of them"
        raise ConfigError("LOCAL_WORLD_SIZE", per_node, rule, "For example: torchrun --nnodes 2 --nproc-per-node 8.")
    nodes, links = world_size // per_node, {}
    if per_node > 1:
        within = [list(range(node * per_node, (node + 1) * per_node)) for node in range(nodes)]
        links["intra"] = [dist.new_group(ranks) for ranks in within][rank // per_node]
    inner, levels = 1, levels or {}
    for name, outer in zip(["inter", *levels], [*levels.items(), ("", nodes)], strict=True):
        domain = min(outer[1], nodes)
        if nodes % domain:
            rule = f"does not divide the job's {nodes} nodes: each domain needs all of its nodes"
            way_out = f"Measure on {nodes // domain * domain} nodes."
            raise ConfigError("--levels", f"{outer[0]}:{domain}", rule, way_out)
        if domain > inner:
            links[name] = _across(inner * per_node, domain * per_node)
        inner = domain
    world = dist.group.WORLD
    assert world is not None
    return Bench(
        device=device,
        dtype=dtype,
        world=world,
        links=links,
        nodes=nodes,
        repeats=repeats,
        report=report,
        levels=levels,
    )


def _across(stride: int, span: int) -> dist.ProcessGroup:
    """This rank's group of those that are so many ranks apart in its span of consecutive ranks; all ranks make all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    starts = [begin + place for begin in range(0, world_size, span) for place in range(stride)]
    groups: dict[int, dist.ProcessGroup] = {}
    for start in starts:
        groups[start] = dist.new_group(list(range(start, start // span * span + span, stride)))
    return groups[rank // span * span + rank % stride]


def _point(task: Task, turns_s: list[float]) -> Point:
    """The median of the repeats, and their spread."""
    median = statistics.median(turns_s)
    low, _, high = statistics.quantiles(turns_s, n=4) if len(turns_s) > 1 else (median, median, median)
    return Point(units=task.units, time_s=median * task.share, spread=(high - low) / median)


def measure(plan: BenchPlan, bench: Bench, how: str) -> MachineMeasurement:
    """Measure everything; collective over `bench.world`, with the same result on every rank.

    Args:
        plan: amounts to measure.
        bench: device and process groups.
        how: backend, versions and date, for the sources in the cluster file.
    """
    per_node = dist.get_world_size(bench.world) // bench.nodes
    bench.report("matrix products")
    gemm = bench.series([_gemm(plan, bench, tokens) for tokens in plan.tokens])
    bench.report("copies")
    copy = bench.series([_copy(size, bench) for size in plan.copy_bytes])
    links, members, on_gpu = {}, {}, bench.device.type == "cuda"
    for link, group in bench.links.items():
        members[link] = dist.get_world_size(group)
        for operation in COLLECTIVES:
            bench.report(f"{operation}, {link}")
            tasks = [_collective(operation, size, group, bench) for size in plan.sizes_bytes]
            links[operation, link] = bench.series(tasks) if on_gpu else _between_products(tasks, plan, bench)
    return MachineMeasurement(
        device=device_name(bench.device),
        memory_bytes=_memory_bytes(bench, per_node),
        nodes=bench.nodes,
        ranks_per_node=per_node,
        cores_per_node=usable_cores(),
        expert=plan.expert,
        gemm=gemm,
        copy=copy,
        links=links,
        members=members,
        how=how,
        repeats=bench.repeats,
        ranks_per_device=_ranks_per_device(plan, bench, per_node),
        levels=bench.levels,
        extra=_host_to_device(plan, bench),
    )


def device_name(device: torch.device) -> str:
    """The device's name in a cluster file: the GPU without its vendor, or the CPU threads of a rank."""
    if device.type == "cuda":
        return "-".join(torch.cuda.get_device_name(device).removeprefix("NVIDIA ").split())
    threads = torch.get_num_threads()
    return "CPU-thread" if threads == 1 else f"CPU-{threads}-threads"


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gemm(plan: BenchPlan, bench: Bench, tokens: int) -> Task:
    """Both products of a rank's experts, forward and backward; time of one expert by its tokens."""
    expert, count = plan.expert, plan.num_experts
    inner = (2 if expert.gated else 1) * expert.ffn

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=bench.device, dtype=bench.dtype)

    rows_NH, first_EIH = random(count * tokens, expert.hidden), random(count, inner, expert.hidden)
    activated_NF, second_EHF = random(count * tokens, expert.ffn), random(count, expert.hidden, expert.ffn)
    leaves = [leaf.requires_grad_() for leaf in (rows_NH, first_EIH, activated_NF, second_EHF)]
    gradients = [random(count * tokens, width) for width in (inner, expert.hidden)]
    groups = Groups.of(rows_NH, torch.full((count,), tokens))

    def both_ways() -> None:
        inner_NI = grouped_linear(rows_NH, first_EIH, groups)
        output_NH = grouped_linear(activated_NF, second_EHF, groups)
        torch.autograd.grad([inner_NI, output_NH], leaves, gradients)

    return Task(tokens, both_ways, 1 / count)


def _ranks_per_device(plan: BenchPlan, bench: Bench, per_node: int) -> float:
    """How many times as fast a node's first rank multiplies while the others wait: CPU ranks may share cores."""
    if bench.device.type == "cuda" or per_node == 1:
        return 1.0
    bench.report("matrix products of one rank alone")
    all_at_once = _gemm(plan, bench, max(plan.tokens))
    first = dist.get_rank(bench.world) % per_node == 0
    alone = replace(all_at_once, call=all_at_once.call if first else lambda: None)
    together_s, alone_s = (point.time_s for point in bench.series([all_at_once, alone]).points)
    return max(1.0, together_s / alone_s)


def _between_products(tasks: Sequence[Task], plan: BenchPlan, bench: Bench) -> Series:
    """The tasks' times between products: each call follows a product, whose own time is subtracted."""
    product = _gemm(plan, bench, plan.tokens[len(plan.tokens) // 2]).call

    def after_product(task: Task) -> Task:
        return replace(task, call=lambda: (product(), task.call()))

    both = [after_product(task) for task in tasks]
    *points, alone = bench.series([*both, Task(1.0, product)], CALLS_BETWEEN_PRODUCTS).points
    return Series(points=tuple(_less(point, alone.time_s) for point in points))


def _less(point: Point, time_s: float) -> Point:
    """A point less the time of something else; the spread of its repeats stays."""
    left_s = max(point.time_s - time_s, LEAST_S)
    return replace(point, time_s=left_s, spread=point.spread * point.time_s / left_s)


def _copy(size: int, bench: Bench) -> Task:
    """A copy inside the device's memory; its units are bytes read and written."""
    source = torch.zeros(size, device=bench.device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return Task(2.0 * size, lambda: target.copy_(source))


def _host_to_device(plan: BenchPlan, bench: Bench) -> dict[str, float]:
    """Bytes a second from pinned host memory to the device and back; empty on a CPU."""
    if bench.device.type != "cuda":
        return {}
    bench.report("copies to and from the host")
    size = max(plan.copy_bytes)
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    there = Task(size, lambda: device.copy_(host, non_blocking=True))
    back = Task(size, lambda: host.copy_(device, non_blocking=True))
    rates = [point.units / point.time_s for point in bench.series([there, back]).points]
    return dict(zip(("host to device", "device to host"), rates, strict=True))


def _collective(operation: str, size: int, group: dist.ProcessGroup, bench: Bench) -> Task:
    """One collective on buffers of about `size` bytes; its units are bytes through the busiest port (see Series)."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    elements = -(-size // (bench.dtype.itemsize * ranks)) * ranks  # an all-to-all divides it into equal parts
    buffer = torch.zeros(elements, device=bench.device, dtype=bench.dtype)
    other = torch.zeros_like(buffer)
    num_bytes = elements * bench.dtype.itemsize
    crossing = num_bytes * (ranks - 1) / ranks
    if operation == "all_to_all":
        return Task(crossing, lambda: dist.all_to_all_single(other, buffer, group=group))
    if operation == "all_reduce":
        return Task(2 * crossing, lambda: dist.all_reduce(buffer, group=group))
    if operation == "ring":
        part = torch.zeros(elements // ranks, device=bench.device, dtype=bench.dtype)
        return Task(2 * crossing, lambda: _ring(buffer, part, group))
    assert operation == "send_recv", operation
    following, previous = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))

    def shift() -> None:
        """Send to the next rank and receive from the one before: every port carries one message each way."""
        sent = dist.P2POp(dist.isend, buffer, following, group)
        received = dist.P2POp(dist.irecv, other, previous, group)
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()

    return Task(num_bytes, shift)


def _ring(buffer: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> None:
    """A reduce-scatter and an all-gather: each rank gets a part, then the whole."""
    dist.reduce_scatter_tensor(part, buffer, group=group)
    dist.all_gather_into_tensor(buffer, part, group=group)


def _memory_bytes(bench: Bench, ranks_per_node: int) -> float:
    """Bytes of the rank with the least memory."""
    if bench.device.type == "cuda":
        here = float(torch.cuda.get_device_properties(bench.device).total_memory)
    else:
        here = _host_bytes() / ranks_per_node
    least = torch.tensor(here, dtype=torch.float64, device=bench.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=bench.world)
    return float(least)


def _host_bytes() -> float:
    """Bytes of this machine's memory, or of the container's that this process is in."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(physical, float(limit)) if limit.isdecimal() else physical
