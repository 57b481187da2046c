"""The launcher's story: read, merge, prepare, check, write the run directory, run."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch import process, run_dir
from megatron_smartmoe.adapter.launch.topology import Topology, find_topology
from megatron_smartmoe.errors import ConfigError, SmartMoEError
from megatron_smartmoe.spec.run import FlagValue, RunSpec, load_run_spec

ENTRY = "megatron_smartmoe.adapter.pretrain"
EXIT_CONFIG_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be run, once everything is known."""

    command: list[str]
    environment: dict[str, str]
    run_dir: Path
    spec: RunSpec
    topology: Topology


def main(argv: Sequence[str] | None = None) -> int:
    """Launch; returns the exit status of the run, 2 for a wrong command line."""
    try:
        return launch(list(sys.argv[1:] if argv is None else argv))
    except SmartMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR


def launch(argv: list[str]) -> int:
    """From a command line to a finished run."""
    options, command_line = build_parser().parse_known_args(argv)
    if options.help_megatron:
        return _help_megatron()
    spec = read_spec(options)
    topology = find_topology(ranks_per_node(options, spec, command_line))
    if topology.needs_srun:
        return _srun(topology, argv)
    directory = run_dir.choose(options.run_dir, spec.name)
    prepared = prepare_data(spec, dry_run=options.dry_run)
    plan = make_plan(spec, command_line, topology, directory, data_exists=prepared)
    text = flag_lists.render(plan.command, plan.environment)
    if options.dry_run:
        if topology.speaks:
            print(text)
        return 0
    if topology.speaks:
        run_dir.create(directory, plan.spec, text)
        print(
            f"smartmoe: {topology.world_size} ranks on {topology.num_nodes} node(s), run directory {directory}",
            flush=True,
        )
    if topology.rank is not None:
        os.environ.update(plan.environment)
        os.execv(plan.command[0], plan.command)
    log = directory / ("train.log" if topology.node == 0 else f"node{topology.node}.log")
    directory.mkdir(parents=True, exist_ok=True)  # another node may have come first
    return process.run(plan.command, plan.environment, log)


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own flags; everything else is for Megatron."""
    parser = argparse.ArgumentParser(
        prog="scripts/pretrain_gpt_moe.sh",
        description="Pretrain a GPT-MoE with Megatron, on this host or on the nodes of a Slurm allocation.",
        epilog="Every other flag goes to Megatron and beats the configuration file (--no-X takes a flag X of the file "
        "away). {run_dir} in a value becomes the run directory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run configuration, e.g. configs/runs/quickstart.yaml"
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
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the exact command, run nothing")
    parser.add_argument("--help-megatron", action="store_true", help="list every flag of Megatron")
    return parser


def read_spec(options: argparse.Namespace) -> RunSpec:
    """The configuration file, else the one of an existing run directory, else nothing."""
    if options.config is not None:
        return load_run_spec(options.config)
    if options.run_dir is not None and (options.run_dir / "config.yaml").is_file():
        return load_run_spec(options.run_dir / "config.yaml")
    return RunSpec(name="run")


def ranks_per_node(options: argparse.Namespace, spec: RunSpec, command_line: Sequence[str]) -> int:
    """--nproc, else the configuration's, else one per GPU, else 1.

    Raises:
        ConfigError: not a positive number, or more ranks than GPUs on a machine that has some.
    """
    from megatron_smartmoe.adapter.arguments import device_from

    if options.nproc is not None and options.nproc < 1:
        raise ConfigError("--nproc", options.nproc, "must be at least 1", "Pass the number of ranks per node.")
    asked = options.nproc or spec.nproc
    num_gpus = 0 if device_from(command_line) == "cpu" else count_gpus()
    if asked and num_gpus and asked > num_gpus:
        way_out = f"Pass --nproc {num_gpus} and a parallelism that fits, or --smartmoe-device cpu."
        raise ConfigError("--nproc", asked, f"there are {num_gpus} GPUs here, and each rank needs one", way_out)
    return asked or num_gpus or 1


def count_gpus() -> int:
    """GPUs that CUDA programs may use here."""
    import torch

    return torch.cuda.device_count()


def prepare_data(spec: RunSpec, *, dry_run: bool) -> bool:
    """Prepare the configuration's corpus if it is not there yet. Returns whether it is there now.

    Nodes and runs that come at the same time wait for the first one (the preparation holds a lock).
    """
    if spec.data is None:
        return True
    prefix = Path(spec.data["prefix"])
    if prefix.with_name(prefix.name + ".idx").is_file():
        return True
    tokens = [token for name, value in spec.data.items() if name != "prefix" for token in _data_tokens(name, value)]
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.corpus", "--output-prefix", str(prefix), *tokens]
    if dry_run:
        print(f"# first, once:\n{flag_lists.render(command, {})}\n")
        return False
    print(f"smartmoe: preparing {prefix}, once", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ConfigError(
            "data", str(prefix), f"could not be prepared (exit status {status})", "See the message above."
        )
    return True


def _data_tokens(name: str, value: object) -> list[str]:
    if value is False or value is None:
        return []
    return flag_lists.tokens_of(
        name, True if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    )


def make_plan(
    spec: RunSpec, command_line: Sequence[str], topology: Topology, directory: Path, *, data_exists: bool
) -> Plan:
    """Merge the flags, check them as the ranks will, and write down the command.

    Raises:
        ConfigError: anything that would stop the ranks.
    """
    from megatron_smartmoe.adapter.arguments import build_parser as megatron_parser
    from megatron_smartmoe.adapter.arguments import device_from
    from megatron_smartmoe.adapter.checks import megatron_verdict
    from megatron_smartmoe.adapter.pretrain import check_flags, choose_device, with_defaults

    cpu = choose_device(device_from(command_line))
    data = _dataset_flags(spec)
    tokens = flag_lists.merge({**data, **spec.flags}, command_line, megatron_parser()._option_string_actions)
    tokens = [token.replace("{run_dir}", str(directory)) for token in tokens]
    os.environ["WORLD_SIZE"] = str(topology.world_size)
    args = check_flags(with_defaults(tokens, cpu=cpu, say=False), cpu=cpu, data_exists=data_exists)
    if not args.use_checkpoint_args:
        megatron_verdict(args)
    return Plan(
        command=[*_program(topology), *tokens, "--smartmoe-run-dir", str(directory)],
        environment=_environment(topology, cpu=cpu),
        run_dir=directory,
        spec=run_dir.resolve(spec, flag_lists.as_mapping(tokens), directory, topology.ranks_per_node),
        topology=topology,
    )


def _dataset_flags(spec: RunSpec) -> dict[str, FlagValue]:
    """The flags that read what `data` prepares."""
    if spec.data is None:
        return {}
    model = spec.data.get("tokenizer-model") or f"{spec.data['prefix']}.tokenizer.model"
    return {
        "data-path": str(spec.data["prefix"]),
        "tokenizer-type": "SentencePieceTokenizer",
        "tokenizer-model": str(model),
    }


def _program(topology: Topology) -> list[str]:
    """What starts the ranks: torchrun, or, where Slurm starts each of them, the entry itself."""
    if topology.rank is not None:
        return [sys.executable, "-m", ENTRY]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(topology.ranks_per_node)]
    if topology.num_nodes == 1:
        return [*torchrun, "--standalone", "--module", ENTRY]
    where = ["--nnodes", str(topology.num_nodes), "--node-rank", str(topology.node)]
    master = ["--master-addr", topology.master_addr, "--master-port", str(topology.master_port)]
    return [*torchrun, *where, *master, "--module", ENTRY]


def _environment(topology: Topology, *, cpu: bool) -> dict[str, str]:
    """Variables of the ranks; what the user has set already stays."""
    threads = max(1, (os.cpu_count() or 1) // topology.ranks_per_node) if cpu else 1
    environment = {"OMP_NUM_THREADS": str(threads)}
    if topology.rank is not None:
        environment |= {
            "RANK": str(topology.rank),
            "WORLD_SIZE": str(topology.world_size),
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(topology.ranks_per_node),
            "MASTER_ADDR": topology.master_addr,
            "MASTER_PORT": str(topology.master_port),
        }
        return environment
    return {name: os.environ.get(name, value) for name, value in environment.items()}


def _srun(topology: Topology, argv: Sequence[str]) -> int:
    """Start one launcher per node of the allocation."""
    if shutil.which("srun") is None:
        raise ConfigError("SLURM_JOB_NUM_NODES", topology.num_nodes, "srun is not on PATH", "Load Slurm's programs.")
    nodes = ["--nodes", str(topology.num_nodes), "--ntasks", str(topology.num_nodes), "--ntasks-per-node", "1"]
    command = ["srun", *nodes, "--kill-on-bad-exit=1", sys.executable, "-m", __package__, *argv]

    def terminate(child: object) -> None:  # srun itself would kill its tasks at once; this way they hear SIGTERM
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=False)

    return process.run(command, {}, None, terminate)


def _help_megatron() -> int:
    from megatron_smartmoe.adapter.arguments import help_text
    from megatron_smartmoe.adapter.pretrain import choose_device

    choose_device("auto")
    print(help_text())
    return 0
