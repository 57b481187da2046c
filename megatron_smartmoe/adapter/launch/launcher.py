"""The launcher's story: read, plan if asked to, merge, check, prepare, write the run directory, run."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smartmoe.adapter.launch import corpus, process, run_dir
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.plan import make_plan, ranks_per_node
from megatron_smartmoe.adapter.launch.topology import Topology, find_topology, speaks_for_the_job
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.launch.auto import Planned


def main(argv: Sequence[str] | None = None) -> int:
    """Launch; returns the exit status of the run, 2 for a wrong command line."""
    try:
        return launch(list(sys.argv[1:] if argv is None else argv))
    except SmartMoEError as error:
        if speaks_for_the_job():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


def launch(argv: list[str]) -> int:
    """From a command line to a finished run."""
    options, command_line = build_parser().parse_known_args(argv)
    if options.help_megatron:
        return _help_megatron()
    _check_load(options)
    spec = corpus.only_if_read(read_spec(options), command_line)
    topology = find_topology(ranks_per_node(options.nproc, spec, command_line))
    if topology.needs_srun and "SLURMD_NODENAME" not in os.environ:
        return srun(topology, argv)  # salloc's shell, perhaps on a login node: its GPUs say nothing of the nodes'
    directory = run_dir.choose(options.run_dir, spec.name)
    planned = None
    if options.parallel == "auto":
        from megatron_smartmoe.adapter.launch.auto import Load, plan_parallel  # the planner takes time to import

        load = Load(options.parallel_trace, options.parallel_skew)
        planned = plan_parallel(spec, command_line, topology, directory, load)
        spec, command_line = planned.spec, planned.command_line
    plan = make_plan(spec, command_line, topology, directory)
    if topology.needs_srun:  # after the check: wrong flags are said once, before any node starts
        return srun(topology, argv)
    text = flag_lists.render(plan.command, plan.environment)
    if options.dry_run:
        if topology.speaks:
            _say(planned, "# ")
            _show(spec, text)
        return 0
    if topology.speaks:
        _say(planned, "smartmoe: ")
    if not corpus.exists(spec):
        corpus.prepare(spec)
    if topology.speaks:
        run_dir.create(directory, plan.spec, text)
        if planned is not None:
            planned.save(directory)
        where = f"{topology.world_size} ranks on {topology.num_nodes} node(s)"
        print(f"smartmoe: {where}, run directory {directory}", flush=True)
    if topology.rank is not None:
        os.environ.update(plan.environment)
        os.execv(plan.command[0], plan.command)
    directory.mkdir(parents=True, exist_ok=True)  # another node may have come first
    log = directory / ("train.log" if topology.node == 0 else f"node{topology.node}.log")
    return process.run(plan.command, plan.environment, log)


def _say(planned: Planned | None, prefix: str) -> None:
    """Print what was planned, if anything was."""
    for line in planned.lines if planned is not None else ():
        print(prefix + line, flush=True)


def _show(spec: RunSpec, command: str) -> None:
    if not corpus.exists(spec):
        print(f"# first, once:\n{flag_lists.render(corpus.preparation(spec), {})}\n")
    print(command)


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own flags; everything else is for Megatron."""
    parser = argparse.ArgumentParser(
        prog=run_dir.launcher_command(),
        description="Pretrain a GPT-MoE with Megatron, on this host or on the nodes of a Slurm allocation.",
        epilog="Every other flag goes to Megatron and beats the configuration file (--no-X takes a flag X of the file "
        "away). {run_dir} in a value becomes the run directory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a run configuration, or the name of a shipped one (configs/runs/), such as quickstart",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks per node; default: the file's, else one per GPU, else 1"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="default: a new directory under runs/. An existing one is gone on with, from its own config.yaml unless "
        "--config is given",
    )
    parser.add_argument(
        "--parallel",
        choices=("given", "auto"),
        default="given",
        help="auto: plan the parallel strategy for this machine. Parallel flags of the command line are kept, those of "
        "the configuration are replaced; prices are those of --smartmoe-cluster FILE, else of the shipped file for "
        "this GPU or the CPU. default: given, nothing is planned",
    )
    load = parser.add_mutually_exclusive_group()
    text = "of --parallel auto: plan for the load of this routing trace (.npz, or Megatron's trace directory)"
    load.add_argument("--parallel-trace", type=Path, metavar="FILE", help=text)
    text = "of --parallel auto: plan for a hottest expert of S times the mean, or for: even, mild, uneven, strong"
    load.add_argument("--parallel-skew", metavar="S", help=f"{text} (default: from how the router is balanced)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the exact command, run nothing")
    parser.add_argument("--help-megatron", action="store_true", help="list every flag of Megatron")
    return parser


def _check_load(options: argparse.Namespace) -> None:
    """A load is planned for, or it is not said."""
    for name in ("trace", "skew"):
        value = getattr(options, f"parallel_{name}")
        if value is not None and options.parallel != "auto":
            rule = "says what load to plan for, and nothing is planned"
            raise ConfigError(f"--parallel-{name}", str(value), rule, "Add --parallel auto, or leave it out.")


def read_spec(options: argparse.Namespace) -> RunSpec:
    """The configuration file, else the one of an existing run directory, else nothing."""
    if options.config is not None:
        return load_run_spec(options.config)
    if options.run_dir is not None and (options.run_dir / "config.yaml").is_file():
        return load_run_spec(options.run_dir / "config.yaml")
    return RunSpec(name="run")


def srun(topology: Topology, argv: Sequence[str], module: str = __package__) -> int:
    """Start one launcher, or another module, per node of the allocation."""
    if shutil.which("srun") is None:
        raise ConfigError("SLURM_JOB_NUM_NODES", topology.num_nodes, "srun is not on PATH", "Load Slurm's programs.")
    nodes = ["--nodes", str(topology.num_nodes), "--ntasks", str(topology.num_nodes), "--ntasks-per-node", "1"]
    command = ["srun", *nodes, "--cpu-bind=none", "--kill-on-bad-exit=1", sys.executable, "-m", module, *argv]

    def terminate(child: object) -> None:  # srun itself would kill its tasks at once; this way they hear SIGTERM
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=False)

    return process.run(command, {}, None, terminate)


def _help_megatron() -> int:
    from megatron_smartmoe.adapter.flags.parser import help_text
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device("auto")
    print(help_text())
    return 0
