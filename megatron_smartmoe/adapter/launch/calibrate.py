"""The ranks of `smartmoe calibrate`: find the machine, start the ranks, measure, write the cluster file. No Megatron.

`python -m megatron_smartmoe.adapter.launch.calibrate` starts the ranks as the launcher starts training: torchrun on
this host, on each node of a Slurm allocation, or the task itself where Slurm starts one per rank. Under torchrun (with
RANK in the environment) it measures as one of the ranks.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_smartmoe.adapter.launch import process
from megatron_smartmoe.adapter.launch.command import program, rank_environment
from megatron_smartmoe.adapter.launch.ending import Ending
from megatron_smartmoe.adapter.launch.slurm import srun, step_options
from megatron_smartmoe.adapter.launch.topology import find_topology, reports_errors
from megatron_smartmoe.calibrate.cluster_file import fit_machine
from megatron_smartmoe.calibrate.measure import BenchPlan, bench_of_job, measure, usable_cores
from megatron_smartmoe.calibrate.measurement import MachineMeasurement
from megatron_smartmoe.calibrate.options import CalibrateOptions, add_arguments, as_argv, copy_sizes, domains_of
from megatron_smartmoe.calibrate.table import as_table
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.cluster import ClusterSpec, cluster_as_yaml, load_cluster_spec
from megatron_smartmoe.spec.devices import fitting_cluster

_MODULE = "megatron_smartmoe.adapter.launch.calibrate"


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, or measure as one of them; returns the exit status, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="smartmoe calibrate", description="Measure this machine.")
    add_arguments(parser)
    parsed = parser.parse_args(argv)
    try:
        options = CalibrateOptions.of(parsed)
        nominal = None if options.compare is None else load_cluster_spec(options.compare)  # wrong files fail early
        if "RANK" in os.environ:
            return run_rank(options, nominal)
        return start_ranks(options)
    except SmartMoEError as error:
        if reports_errors() and os.environ.get("RANK", "0") == "0":
            print(f"smartmoe calibrate: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


def start_ranks(options: CalibrateOptions) -> int:
    """Start the ranks of this host, or of this Slurm allocation.

    Raises:
        ConfigError: more ranks than GPUs.
    """
    cuda = _kind(options) == "cuda"
    topology = find_topology(_ranks(options, cuda))
    if topology.needs_srun:
        return srun(topology, as_argv(options), step_options(None), _MODULE)
    environment = rank_environment(topology, cpu=not cuda)
    # Without --nproc: ranks have LOCAL_WORLD_SIZE, and torchrun takes --nproc for its own option wherever it stands.
    command = [*program(topology, _MODULE), *as_argv(replace(options, nproc=None))]
    if topology.rank is not None:
        os.environ.update(environment)
        os.execv(command[0], command)
    return process.run(command, environment, None, ending=Ending())


def run_rank(options: CalibrateOptions, nominal: ClusterSpec | None) -> int:
    """Measure as one of the ranks that torchrun or Slurm has started; rank 0 prints and writes.

    Raises:
        ConfigError: nodes with unequal numbers of ranks.
    """
    kind = _kind(options)
    options = options.for_device(kind)
    local, per_node = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if kind == "cuda" else None)
    try:
        dtype = _dtype(kind)
        levels = _levels(options, nominal)
        bench = bench_of_job(device, dtype, per_node, options.repeats, _report_progress, levels)
        measured = measure(_plan(options, kind, dtype), bench, _how(backend, dtype))
        if dist.get_rank() == 0:
            shipped = fitting_cluster(torch.cuda.get_device_name() if kind == "cuda" else None)
            _report(measured, options, nominal or shipped)
    finally:
        dist.destroy_process_group()
    return 0


def _levels(options: CalibrateOptions, nominal: ClusterSpec | None) -> dict[str, int]:
    """Nodes of one domain by level: of --levels, else of the file of --compare."""
    if options.levels is None and nominal is not None:
        return {level.name: level.nodes for level in nominal.levels}
    return domains_of(options.levels or ())


def _kind(options: CalibrateOptions) -> str:
    return "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"


def _ranks(options: CalibrateOptions, cuda: bool) -> int:
    """Ranks per node: --nproc, else one per GPU, else one per core."""
    num_gpus = torch.cuda.device_count()
    if cuda and options.nproc is not None and options.nproc > num_gpus:
        rule = f"there are {num_gpus} GPUs here, and each rank needs one"
        raise ConfigError("--nproc", options.nproc, rule, f"Pass --nproc {num_gpus}, or --device cpu.")
    return options.nproc or (num_gpus if cuda else usable_cores())


def _dtype(kind: str) -> torch.dtype:
    """The precision that training uses: bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    if kind == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _plan(options: CalibrateOptions, kind: str, dtype: torch.dtype) -> BenchPlan:
    assert options.hidden is not None, "for_device fills all of them in"
    assert options.ffn is not None
    assert options.experts is not None
    assert options.tokens is not None
    assert options.sizes is not None
    return BenchPlan(
        expert=ExpertShape(hidden=options.hidden, ffn=options.ffn, element_bytes=dtype.itemsize),
        num_experts=options.experts,
        tokens=options.tokens,
        sizes_bytes=options.sizes,
        copy_bytes=copy_sizes(kind),
    )


def _report_progress(name: str) -> None:
    if dist.get_rank() == 0:
        print(f"measuring {name} ...", flush=True)


def _how(backend: str, dtype: torch.dtype) -> str:
    version = f"torch {torch.__version__}"
    if backend == "nccl":
        version += f", NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"  # type: ignore[no-untyped-call]
    number = torch.get_num_threads()
    threads = f"{number} thread{'s' * (number > 1)} per rank, " if backend == "gloo" else ""
    return f"{backend}, {str(dtype).removeprefix('torch.')}, {threads}{version}, {datetime.date.today().isoformat()}"


def _report(measured: MachineMeasurement, options: CalibrateOptions, nominal: ClusterSpec | None) -> None:
    """Print the table, write the file."""
    fit = fit_machine(measured, nominal, options.name or options.output.stem)
    cluster = fit.cluster
    if nominal is None and measured.device.startswith("CPU"):
        cluster = replace(cluster, replica_scope="group")
    print(f"\n{as_table(measured, fit, nominal)}\n")
    notes = "\n".join(f"warning: {warning}" for warning in fit.warnings)
    comment = f"Written by smartmoe calibrate: rates that training reaches, not peaks ({measured.how}).\n{notes}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{options.output}.partial")
    partial.write_text(cluster_as_yaml(cluster, comment.strip()), encoding="utf-8")
    partial.replace(options.output)
    load_cluster_spec(options.output)  # the written file can be read
    print(f"wrote {options.output}: use it with smartmoe plan --cluster FILE, or --smartmoe-cluster FILE in training")


if __name__ == "__main__":
    sys.exit(main())
