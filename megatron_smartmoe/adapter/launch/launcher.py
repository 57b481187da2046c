"""The launcher: read, plan if asked to, merge, check, prepare the data, write the run directory, run."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smartmoe.adapter.launch import corpus, process, run_dir
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.command import make_command, ranks_per_node
from megatron_smartmoe.adapter.launch.topology import Topology, find_topology, reports_errors
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec


def main(argv: Sequence[str] | None = None) -> int:
    """Launch; returns the exit status of the run, 2 for a wrong command line."""
    try:
        return launch(list(sys.argv[1:] if argv is None else argv))
    except SmartMoEError as error:
        if reports_errors():
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
        return srun(topology, argv)  # salloc's shell may be on a login node, whose GPUs are not the nodes'
    directory = run_dir.choose(options.run_dir, spec.name)
    auto_plan = None
    if options.parallel == "auto":
        from megatron_smartmoe.adapter.launch.auto import Load, plan_parallel  # the planner takes time to import

        load = Load(options.parallel_trace, options.parallel_skew)
        auto_plan = plan_parallel(spec, command_line, topology, directory, load)
        spec, command_line = auto_plan.spec, auto_plan.command_line
    ready = make_command(spec, command_line, topology, directory)
    if topology.needs_srun:  # after the check: an error is printed once, before any node starts
        return srun(topology, argv)
    text = flag_lists.render(ready.command, ready.environment)
    if topology.is_reporter:
        for line in (*(auto_plan.lines if auto_plan is not None else ()), *ready.lines):
            print(("# " if options.dry_run else "smartmoe: ") + line, flush=True)
    if options.dry_run:
        if topology.is_reporter:
            if not corpus.exists(spec):
                print(f"# first, once:\n{flag_lists.render(corpus.preparation(spec), {})}\n")
            print(text)
        return 0
    if not corpus.exists(spec):
        corpus.prepare(spec)
    if topology.is_reporter:
        run_dir.create(directory, ready.spec, text)
        if auto_plan is not None:
            auto_plan.save(directory)
        ranks, nodes = topology.world_size, topology.num_nodes
        where = f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"
        print(f"smartmoe: {where}, run directory {directory}", flush=True)
    if topology.rank is not None:
        os.environ.update(ready.environment)
        os.execv(ready.command[0], ready.command)
    directory.mkdir(parents=True, exist_ok=True)  # another node may have come first
    log = directory / ("train.log" if topology.node == 0 else f"node{topology.node}.log")
    return process.run(ready.command, ready.environment, log)


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own flags; everything else is for Megatron."""
    parser = argparse.ArgumentParser(
        prog=run_dir.launcher_command(),
        description="Pretrain a GPT-MoE with Megatron, on this host or on the nodes of a Slurm allocation.",
        epilog="Every other flag is passed to Megatron and overrides the configuration file; --no-X removes a flag X "
        "of the file. {run_dir} in a value becomes the run directory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a run configuration, or the name of a shipped one (configs/runs/), such as quickstart",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks per node; default: nproc of the configuration, else one per GPU, else 1",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="run directory; default: a new one under runs/. If DIR exists, the run resumes from it, with its "
        "config.yaml unless --config is given",
    )
    parser.add_argument(
        "--parallel",
        choices=("given", "auto"),
        default="given",
        help="auto: plan the parallel strategy for this machine. Parallel flags of the command line are kept, those of "
        "the configuration are replaced; step times are predicted from --smartmoe-cluster FILE, else from the shipped "
        "file for this GPU or the CPU. given: use the flags as they are. default: given",
    )
    load = parser.add_mutually_exclusive_group()
    text = "with --parallel auto: plan for the load in this routing trace (.npz, or Megatron's trace directory)"
    load.add_argument("--parallel-trace", type=Path, metavar="FILE", help=text)
    text = "with --parallel auto: plan for a load whose hottest expert gets S times the mean; a number, or even, mild, "
    text += "uneven or strong (default: assumed from how the router is balanced)"
    load.add_argument("--parallel-skew", metavar="S", help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the exact command, but run nothing"
    )
    parser.add_argument("--help-megatron", action="store_true", help="list all flags of Megatron and --smartmoe-*")
    return parser


def _check_load(options: argparse.Namespace) -> None:
    """Flags of --parallel auto are not ignored without it."""
    for name in ("trace", "skew"):
        value = getattr(options, f"parallel_{name}")
        if value is not None and options.parallel != "auto":
            rule = "has no effect without --parallel auto"
            raise ConfigError(f"--parallel-{name}", str(value), rule, "Add --parallel auto, or remove it.")


def read_spec(options: argparse.Namespace) -> RunSpec:
    """The configuration file, else that of an existing run directory, else an empty one."""
    if options.config is not None:
        return load_run_spec(options.config)
    if options.run_dir is not None and (options.run_dir / "config.yaml").is_file():
        return load_run_spec(options.run_dir / "config.yaml")
    return RunSpec(name="run")


def srun(topology: Topology, argv: Sequence[str], module: str = __package__) -> int:
    """Start one launcher, or another module, per node of the allocation."""
    if shutil.which("srun") is None:
        raise ConfigError(
            "SLURM_JOB_NUM_NODES", topology.num_nodes, "srun is not on PATH", "Add Slurm's programs to PATH."
        )
    nodes = ["--nodes", str(topology.num_nodes), "--ntasks", str(topology.num_nodes), "--ntasks-per-node", "1"]
    command = ["srun", *nodes, "--cpu-bind=none", "--kill-on-bad-exit=1", sys.executable, "-m", module, *argv]

    def terminate(child: object) -> None:  # srun itself would kill its tasks at once; scancel sends them SIGTERM
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=False)

    return process.run(command, {}, None, terminate)


def _help_megatron() -> int:
    from megatron_smartmoe.adapter.flags.parser import help_text
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device("auto")
    print(help_text())
    return 0
