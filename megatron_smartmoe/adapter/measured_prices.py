"""A machine's prices, measured when training starts: for GPUs that no cluster file is shipped for.

A few seconds of what `smartmoe calibrate` measures, with the sizes of this run's experts and fewer points and repeats,
before the model takes the memory. Every repeat counts its slowest rank, so all ranks have the same numbers and make the
same decisions of them.
"""

from __future__ import annotations

import time
from argparse import Namespace

import torch
import torch.distributed as dist

from megatron_smartmoe.adapter import cost_inputs
from megatron_smartmoe.calibrate.cluster_file import fit_machine
from megatron_smartmoe.calibrate.measure import Bench, BenchPlan, bench_of_job, measure
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.spec.cluster import ClusterSpec

_EXPERTS = 4  # experts of a rank that are multiplied; their products share the GPU, so more tell nothing new
_TOKENS = (64, 512, 4096)  # of an expert
_SIZES_BYTES = (64 << 10, 4 << 20, 64 << 20)
_COPY_BYTES = (64 << 20, 256 << 20)
_REPEATS = 3


def measure_if_unknown(args: Namespace) -> None:
    """Measure this job's machine if its GPU has no cluster file and the flags name none. A call of all ranks.

    Args:
        args: Megatron's arguments, validated; process groups exist.
    """
    if not torch.cuda.is_available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    # nodes may differ in their GPUs; all ranks measure, or none
    unknown = torch.tensor(float(cost_inputs.lacks_prices(args)), device=device)
    dist.all_reduce(unknown, op=dist.ReduceOp.MAX)
    if not unknown.item():
        return
    plan = BenchPlan(
        expert=cost_inputs.expert_shape(args),
        num_experts=min(_EXPERTS, args.num_experts // args.expert_model_parallel_size),
        tokens=_TOKENS,
        sizes_bytes=_SIZES_BYTES,
        copy_bytes=_COPY_BYTES,
    )
    bench = bench_of_job(device, args.params_dtype, cost_inputs.ranks_per_node(), _REPEATS)
    line = measure_prices(plan, bench, nearest=cost_inputs.machine(args))
    if dist.get_rank() == 0:
        print(f"smartmoe: {line}", flush=True)


def measure_prices(plan: BenchPlan, bench: Bench, nearest: ClusterSpec) -> str:
    """Measure, and use the prices from now on; a call of all ranks.

    Args:
        plan: what to measure.
        bench: with whom.
        nearest: the prices of what cannot be measured, such as links between nodes on one node.

    Returns:
        What to say about it, in one line.
    """
    began_s = time.monotonic()
    measured = measure(plan, bench, "at the start of training")
    for group in bench.links.values():
        if group is not bench.world:
            dist.destroy_process_group(group)
    try:
        cluster = fit_machine(measured, nearest).cluster
    except PlanError as error:  # the numbers are the same on all ranks, and so is this
        return f"prices could not be measured ({error}): those of {nearest.name} are used"
    cost_inputs.use_measured(cluster)
    rates = [
        f"{cluster.gpu.peak_flops / 1e12:.3g} TFLOP/s of grouped GEMM",
        f"{cluster.gpu.memory_bandwidth_bytes_s / 1e9:.4g} GB/s of memory",
    ]
    for name, between, link in (
        ("intra", "ranks of a node", cluster.intra_node),
        ("inter", "nodes", cluster.inter_node),
    ):
        if name in bench.links:
            rates.append(f"{link.bandwidth_bytes_s / 1e9:.3g} GB/s between {between}")
    return (
        f"prices measured in {time.monotonic() - began_s:.1f} s on {dist.get_world_size()} x {measured.device}: "
        f"{', '.join(rates)}. To have the same in every run: smartmoe calibrate --output FILE, then "
        "--smartmoe-cluster FILE"
    )
