"""Bandwidth of a migration compared with raw sends and receives of the same bytes, in the same run.

Each rank of one expert-parallel group sends all its experts to the next rank: weights in bf16, fp32 main weights and
two moments. The raw measurement sends as many bytes between the same ranks, from one buffer into another, both
directions at once; nothing is packed, verified or written. The two alternate. Reported are the medians, and the best of
each, which is more telling on a machine that does other work too; and the CPU seconds of a rank, all of its threads
together, with what the checksums and the copy into place take of them when nothing else runs in the process.

    python scripts/bench_migration.py                       # 2 gloo ranks on this machine
    torchrun --nproc-per-node 8 scripts/bench_migration.py  # NCCL, one rank per GPU
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_smartmoe.cost.memory.buffers import MIGRATION_CHUNK_BYTES
from megatron_smartmoe.placement.migration import MigrationPlan, plan_migration
from megatron_smartmoe.placement.transfers import LayerLayout, TensorLayout
from megatron_smartmoe.runtime.migration.exchange import ExpertExchange, MigrationReport
from megatron_smartmoe.runtime.migration.expert_tensors import LayerState
from megatron_smartmoe.runtime.migration.staging import chunk_checksum
from megatron_smartmoe.runtime.migration.wire import DIRECT_BYTES

TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    ranks: int
    slots: int
    hidden: int
    ffn: int
    repeats: int
    chunk_mib: float
    staging_mib: int


def layout(options: Options) -> LayerLayout:
    """The tensors of an expert with a gated activation in bf16 training with Adam."""
    tensors = []
    for name, numel in (("weight1", 2 * options.ffn * options.hidden), ("weight2", options.ffn * options.hidden)):
        held_SC2 = np.tile(np.array([0, numel]), (options.slots, 1, 1))
        for suffix, itemsize in (("", 2), ("/main", 4), ("/exp_avg", 4), ("/exp_avg_sq", 4)):
            tensors.append(
                TensorLayout(name=name + suffix, numel=numel, itemsize=itemsize, copies=((0,),), held_SC2=held_SC2)
            )
    return LayerLayout(layer=0, tensors=tuple(tensors))


def live_state(layer: LayerLayout, device: torch.device) -> LayerState:
    """Random experts as `SlottedExperts` has them: the slots of a tensor lie one after another."""
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    columns = [
        torch.randn(layer.home_slots, t.numel, device=device, dtype=torch.float32).to(dtypes[t.itemsize])
        for t in layer.tensors
    ]
    pieces = tuple(tuple(column[slot] for column in columns) for slot in range(layer.home_slots))
    return LayerState(layout=layer, shards=(0,) * len(layer.tensors), pieces=pieces)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one measurement took: seconds until the slowest rank was done, and CPU seconds of this one's process."""

    wall_s: float
    cpu_s: float


def raw(plan: MigrationPlan, buffers: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> Spent:
    """Send the bytes of a plan from buffer to buffer."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    operations = [
        dist.P2POp(dist.isend, buffers[0][: int(plan.sent_bytes_W[rank])], (rank + 1) % size),
        dist.P2POp(dist.irecv, buffers[1][: int(plan.received_bytes_W[rank])], (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    cpu_s = time.process_time() - begin_cpu
    return Spent(wall_s=_slowest(begin, device), cpu_s=cpu_s)


def migrate(exchange: ExpertExchange, plan: MigrationPlan, state: LayerState) -> tuple[Spent, MigrationReport]:
    """A migration, from the comparison of plans to the last commit."""
    dist.barrier()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    report = exchange.execute(plan, {0: state}, lambda step: None)
    cpu_s = time.process_time() - begin_cpu
    return Spent(wall_s=_slowest(begin, state.pieces[0][0].device), cpu_s=cpu_s), report


def parts(plan: MigrationPlan, buffers: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """CPU seconds of the checksums of what a rank sends and receives, and of copying what it receives into place."""
    rank = dist.get_rank()
    begin = time.process_time()
    for buffer, nbytes in zip(buffers, (plan.sent_bytes_W[rank], plan.received_bytes_W[rank]), strict=True):
        for number, start in enumerate(range(0, int(nbytes), DIRECT_BYTES)):
            chunk_checksum(buffer[start : min(start + DIRECT_BYTES, int(nbytes))], number)
    checked = time.process_time()
    received = int(plan.received_bytes_W[rank])
    buffers[0][:received].copy_(buffers[1][:received])
    return checked - begin, time.process_time() - checked


def _slowest(begin: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor([time.perf_counter() - begin], device=device, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(options: Options, device: torch.device) -> None:
    """Alternate both measurements; rank 0 prints."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = layout(options)
    state = live_state(layer, device)
    staging_bytes = options.staging_mib << 20
    before_E = np.arange(size * options.slots)
    after_E = (before_E + options.slots) % len(before_E)
    plan = plan_migration(
        before_E[None],
        after_E[None],
        [layer],
        num_ranks=size,
        staging_bytes=staging_bytes,
        max_chunk_bytes=int(options.chunk_mib * 2**20),
    )
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    exchange = ExpertExchange(
        group=group, workers=range(size), device=device, staging_bytes=staging_bytes, timeout_s=TIMEOUT_S
    )
    most = int(max(plan.sent_bytes_W.max(), plan.received_bytes_W.max()))
    buffers = torch.ones(most, dtype=torch.uint8, device=device), torch.ones(most, dtype=torch.uint8, device=device)
    raws, moves, partly = list[Spent](), list[Spent](), list[tuple[float, float]]()
    for repeat in range(options.repeats + 1):
        raw_spent = raw(plan, buffers, device)
        move_spent, report = migrate(exchange, plan, state)
        part_s = parts(plan, buffers)
        if repeat:  # the first one allocates
            raws.append(raw_spent)
            moves.append(move_spent)
            partly.append(part_s)
        assert report.sent_bytes == plan.sent_bytes_W[rank]
    if rank == 0:
        _print(plan, report, raws, moves)
        _print_cpu(raws, moves, partly)


def _print(plan: MigrationPlan, report: MigrationReport, raws: list[Spent], moves: list[Spent]) -> None:
    sent = int(plan.sent_bytes_W[0])
    print(f"{dist.get_world_size()} ranks, {dist.get_backend()}, {len(plan.steps)} step(s), {len(raws)} repeats")
    print(f"bytes a rank sends    predicted {sent}, sent {report.sent_bytes}")
    print(
        f"staging memory        {report.peak_staging_bytes / 2**20:.0f} MiB, planned {plan.staging_bytes / 2**20:.0f}"
    )
    for name, pick in (("median", statistics.median), ("best", min)):
        raw_s, move_s = (pick([one.wall_s for one in spent]) for spent in (raws, moves))
        print(
            f"{name:<8} raw {raw_s:.3f} s = {sent / raw_s / 1e9:.2f} GB/s per rank and direction; "
            f"migration {move_s:.3f} s = {sent / move_s / 1e9:.2f} GB/s: {raw_s / move_s:.1%}"
        )


def _print_cpu(raws: list[Spent], moves: list[Spent], partly: list[tuple[float, float]]) -> None:
    """Where the CPU time of a migration goes; medians of rank 0."""
    raw_s, move_s = (statistics.median([one.cpu_s for one in spent]) for spent in (raws, moves))
    checksums_s, copy_s = (statistics.median(column) for column in zip(*partly, strict=True))
    print(
        f"CPU      raw {raw_s:.3f} s, migration {move_s:.3f} s: {raw_s / move_s:.1%}; "
        f"alone, the checksums take {checksums_s:.3f} s and the copy into place {copy_s:.3f} s"
    )


def main() -> None:
    """Start the ranks unless torchrun has started them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks to start; ignored under torchrun")
    parser.add_argument("--slots", type=int, default=2, help="experts per rank; all of them move")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--ffn", type=int, default=2048, help="hidden size of an expert's MLP")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument(
        "--chunk-mib", type=float, default=MIGRATION_CHUNK_BYTES / 2**20, help="largest packed chunk, in MiB"
    )
    parser.add_argument("--staging-mib", type=int, default=1024, help="bound of the staging memory, in MiB")
    options = Options(**vars(parser.parse_args()))
    if "RANK" in os.environ:
        _rank(int(os.environ["LOCAL_RANK"]), options)
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(_rank, args=(options,), nprocs=options.ranks)


def _rank(local_rank: int, options: Options) -> None:
    cuda = torch.cuda.is_available() and "RANK" in os.environ
    os.environ.setdefault("RANK", str(local_rank))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    measure(options, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
