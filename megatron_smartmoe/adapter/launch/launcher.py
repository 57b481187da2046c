"""The launcher: read, plan if asked to, merge, check, prepare the data, write the run directory, run."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_smartmoe.adapter.launch import corpus, process, run_dir, run_lock, secrets, slurm
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.batch_job import BatchJob
from megatron_smartmoe.adapter.launch.command import LaunchCommand, fit_to_gpus, make_command, ranks_per_node
from megatron_smartmoe.adapter.launch.ending import Ending, SharedDeaths, attempt_of
from megatron_smartmoe.adapter.launch.node_variables import Nodes, find_nodes, refuse_flags
from megatron_smartmoe.adapter.launch.run_lock import LOCKED_VARIABLE, RunLock
from megatron_smartmoe.adapter.launch.topology import Topology, find_topology, is_outside_steps, reports_errors
from megatron_smartmoe.adapter.launch.watch import no_watch, watch_node
from megatron_smartmoe.adapter.rehearsal.lines import lines_of
from megatron_smartmoe.adapter.rehearsal.rehearse import ALREADY, digest_of, rehearse
from megatron_smartmoe.adapter.starting import starting
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

_REPORT_GRACE_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Launch; returns the exit status of the run, 2 for a wrong command line."""
    try:
        return launch(list(sys.argv[1:] if argv is None else argv))
    except SmartMoEError as error:
        if reports_errors():
            print(f"error: {error}", file=sys.stderr)
        else:  # task 0 says the same; where srun ends all tasks with the first one, it must not be this one
            time.sleep(_REPORT_GRACE_S)
        return EXIT_CONFIG_ERROR


def launch(argv: list[str]) -> int:
    """From a command line to a finished run."""
    options, command_line = build_parser().parse_known_args(argv)
    if options.help_megatron:
        return _help_megatron()
    _check_load(options)
    spec = corpus.only_if_read(read_spec(options), command_line)
    if options.slurm is not None:
        return slurm.submit(options.slurm, argv, dry_run=options.dry_run)
    step_options = slurm.step_options(options.srun_args)
    if is_outside_steps() and (slurm.is_in_container(step_options) or "SLURMD_NODENAME" not in os.environ):
        # The checks are made on the nodes: the Python of a container is another one, and salloc's shell may be on a
        # login node, whose GPUs are not the nodes'.
        return slurm.srun(find_topology(1), argv, step_options)
    nodes = _nodes(options)
    asked = options.nproc if options.nproc is not None or nodes is None else nodes.ranks_per_node
    on_gpus = fit_to_gpus(asked, spec, command_line)
    topology = find_topology(ranks_per_node(asked, on_gpus, command_line), nodes=nodes)
    spec = fit_to_gpus(topology.ranks_per_node, spec, command_line)  # Slurm may have started another number of ranks
    if options.nproc is not None and options.nproc != topology.ranks_per_node:
        rule = f"srun has started {topology.ranks_per_node} tasks on each node, and each of them is one rank"
        raise ConfigError("--nproc", options.nproc, rule, "Remove it, or use srun --ntasks-per-node=1.")
    if topology.source and topology.num_nodes > 1 and options.run_dir is None and not options.dry_run:
        rule = f"the {topology.num_nodes} nodes of this job need one in common, and no job number names it"
        raise ConfigError("--run-dir", None, rule, "Pass one in a folder that all nodes see, the same on each.")
    reserve = run_dir.choose if options.dry_run else run_dir.reserve
    directory = reserve(options.run_dir, spec.name)
    try:
        return _launch(options, command_line, spec, topology, directory, argv, step_options)
    finally:
        if options.run_dir is None and not options.dry_run:
            run_dir.release(directory)  # if nothing came of it


def _nodes(options: argparse.Namespace) -> Nodes | None:
    """The nodes of a job that is not Slurm's."""
    if "SLURM_JOB_ID" not in os.environ:
        return find_nodes(options)
    refuse_flags(options)
    return None


def _launch(
    options: argparse.Namespace,
    command_line: list[str],
    spec: RunSpec,
    topology: Topology,
    directory: Path,
    argv: Sequence[str],
    step_options: Sequence[str],
) -> int:
    """The launch in its run directory, which need not exist."""
    auto_plan = None
    if options.parallel == "auto":
        from megatron_smartmoe.adapter.launch.auto import Load, plan_parallel  # the planner takes time to import

        load = Load(options.parallel_trace, options.parallel_skew)
        auto_plan = plan_parallel(spec, command_line, topology, directory, load)
        spec, command_line = auto_plan.spec, auto_plan.command_line
    with starting():
        ready = make_command(spec, command_line, topology, directory)
    seen = _rehearse(ready, topology, is_dry=options.dry_run)
    if topology.needs_srun:  # after the check: an error is printed once, before any node starts
        return slurm.srun(topology, argv, step_options, ending=_ending(ready, topology, directory))
    _check_directory(topology, directory, dry_run=options.dry_run)
    text = secrets.masked_command(ready.command, ready.environment)
    if topology.is_reporter:
        for line in (*(auto_plan.lines if auto_plan is not None else ()), *ready.lines):
            print(("# " if options.dry_run else "smartmoe: ") + line, flush=True)
    if options.dry_run:
        if topology.is_reporter:
            if not corpus.exists(spec):
                print(f"# first, once:\n{flag_lists.render(corpus.preparation(spec), {})}\n")
            for line in seen:
                print(f"# {line}")
            print(text)
        return 0
    if not corpus.exists(spec):
        corpus.prepare(spec)
        if ready.request is not None:  # what could not be read before
            ready = replace(ready, request=replace(ready.request, data_exists=True, vocabulary=None))
            seen = _rehearse(ready, topology, is_dry=False)
    run_dir.make(directory)  # another node may have come first
    if not topology.is_reporter:
        return _run(ready, topology, directory, keep_open=())
    with RunLock.acquire(directory, _start_of(topology)) as lock:
        run_dir.create(directory, ready.spec, text)
        if auto_plan is not None:
            auto_plan.save(directory)
        for line in (*_start_lines(ready, topology, directory, lock), *seen):
            print(f"smartmoe: {line}", flush=True)
        return _run(ready, topology, directory, keep_open=(lock.descriptor,))


def _rehearse(ready: LaunchCommand, topology: Topology, *, is_dry: bool) -> list[str]:
    """Rehearse the run, once for the whole job, and return what was seen as lines.

    A Slurm task per rank leaves it to the ranks, which wait for rank 0; so do launchers of other nodes.

    Raises:
        ConfigError: what would stop the ranks.
    """
    digest = digest_of(ready.flags)
    is_ours = topology.is_reporter and (topology.rank is None or is_dry)
    if ready.request is None or not is_ours or os.environ.get(ALREADY) == digest:
        return []
    report = rehearse(replace(ready.request, keep_index=not is_dry))
    if ready.request.data_exists:
        os.environ[ALREADY] = digest  # for launchers that srun starts from here
    return [line.replace("{run_dir}", ready.flags[-1]) for line in lines_of(report)]


def _check_directory(topology: Topology, directory: Path, *, dry_run: bool) -> None:
    """Refuse a run directory that cannot be used before anything is done for it; it need not exist.

    Raises:
        ConfigError: it cannot be written, or another run uses it.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if topology.is_reporter:
        run_dir.make(directory)
    if not dry_run:  # looking at the command of a run that is going on is fine
        run_lock.check(directory, _start_of(topology))


def _start_of(topology: Topology) -> str | None:
    """What the launchers of this start have in common where no Slurm step says it."""
    return f"{topology.master_addr}:{topology.master_port}" if topology.source else None


def _start_lines(ready: LaunchCommand, topology: Topology, directory: Path, lock: RunLock) -> list[str]:
    ranks, nodes = topology.world_size, topology.num_nodes
    where = f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"
    where += f" ({topology.source}; node 0 is {topology.master_addr}:{topology.master_port})" * bool(topology.source)
    lines = [] if lock.taken_over is None else [lock.taken_over]
    lines.append(f"{where}, run directory {run_dir.described(directory)}")
    if topology.order:
        lines.append(topology.order)
    if ready.save is not None and ready.save.is_symlink():
        lines.append(f"checkpoints go to {run_dir.described(ready.save)}")
    return lines


def _run(ready: LaunchCommand, topology: Topology, directory: Path, keep_open: Sequence[int]) -> int:
    """Run the ranks of this launcher to their end."""
    log = directory / ("train.log" if topology.node == 0 else f"node{topology.node}.log")
    by_launcher = ready.request is not None and topology.rank is None
    rehearsed = {ALREADY: digest_of(ready.flags)} if by_launcher else {}
    batch, ending = BatchJob.of_environment(directory), _ending(ready, topology, directory)
    status = process.run(
        ready.command,
        {**ready.environment, LOCKED_VARIABLE: "1", **rehearsed},
        log if topology.rank is None else None,  # Slurm collects the output of its tasks
        ending=ending,
        rank=topology.rank,
        keep_open=keep_open,
        watch=watch_node(topology, directory) if topology.rank is None else no_watch,
        stop_note=None if batch is None else batch.stop_note,
    )
    if batch is not None and ending.cause is not None and ending.cause in ending.deaths:
        batch.note_crash(ending.cause)
    return status


def _ending(ready: LaunchCommand, topology: Topology, directory: Path) -> Ending:
    """What the last line needs to know."""
    name = f"node{topology.node}" if topology.rank is None else f"rank{topology.rank}"
    if topology.needs_srun:
        name, attempt = "srun", f"{os.environ['SLURM_JOB_ID']}.{time.time_ns()}"
    else:
        attempt = attempt_of()
    several = topology.num_nodes > 1 or topology.rank is not None or topology.needs_srun
    resume = [*run_dir.launcher_command().split(), "--run-dir", str(directory), *ready.resume_flags]
    where = f" (on each of {topology.num_nodes} nodes)" if topology.source else ""
    where = where or f" (in an allocation of {topology.num_nodes} nodes)" * several
    shared = SharedDeaths(directory=directory, name=name, attempt=attempt) if several else None
    if shared is not None and topology.source:
        with contextlib.suppress(OSError):  # what goes wrong here goes wrong later, with a better message
            shared = shared.from_now_on()
    return Ending(save=ready.save, resume=shlex.join(resume) + where, shared=shared)


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
        help="ranks per node; default: on GPUs what gpus of the configuration has for them, else nproc of the "
        "configuration, else one per GPU, else 1",
    )
    text = "on several nodes without Slurm, once on each: {}; default: what SkyPilot, Kubernetes or NNODES, NODE_RANK, "
    text += "MASTER_ADDR say, else this host"
    parser.add_argument("--nnodes", type=int, metavar="N", help=text.format("how many nodes there are"))
    parser.add_argument("--node-rank", type=int, metavar="K", help="with --nnodes: this node's number, from 0")
    parser.add_argument("--master-addr", metavar="HOST", help="with --nnodes: a name or address of node 0")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="with --nnodes: a free port there (29500)")
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
        "--srun-args",
        metavar="ARGS",
        help="in an allocation of Slurm: options of the srun that starts a launcher on each node, in one word, such as "
        "'--container-image=IMAGE --container-mounts=/data' (default: SMARTMOE_SRUN_ARGS)",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="on a login node: submit this run as a batch job, with these options of sbatch in one word, such as "
        "'--nodes 4 --gpus-per-node 8 --time 8:00:00'; with --dry-run the command is printed",
    )
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
        spec = load_run_spec(options.config)
    elif options.run_dir is not None and os.path.isfile(options.run_dir / "config.yaml"):
        spec = load_run_spec(options.run_dir / "config.yaml")
    else:
        spec = RunSpec(name="run")
    return replace(spec, flags=secrets.revealed_flags(spec.flags))


def _help_megatron() -> int:
    from megatron_smartmoe.adapter.flags.parser import help_text
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device("cpu")  # nothing is trained
    print(help_text())
    return 0
