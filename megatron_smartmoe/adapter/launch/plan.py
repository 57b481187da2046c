"""What will be run: the merged flags, checked as the ranks will check them, and the command that starts the ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_smartmoe.adapter.launch import corpus
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import FlagValue, RunSpec

ENTRY = "megatron_smartmoe.adapter.pretrain"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before a rank starts.

    Attributes:
        command: the program and its arguments.
        environment: what the command needs besides this process's environment.
        spec: the configuration as merged, `{run_dir}` still open.
    """

    command: list[str]
    environment: dict[str, str]
    spec: RunSpec


def asked_device(spec: RunSpec, command_line: Sequence[str]) -> str:
    """--smartmoe-device of the command line, else of the configuration, else auto."""
    from megatron_smartmoe.adapter.flags.parser import device_from

    configured = None if "--no-smartmoe-device" in command_line else spec.flags.get("smartmoe-device")
    return device_from([*(flag_lists.tokens_of("smartmoe-device", configured) if configured else []), *command_line])


def ranks_per_node(nproc: int | None, spec: RunSpec, command_line: Sequence[str]) -> int:
    """--nproc, else the configuration's, else one per GPU, else 1.

    Raises:
        ConfigError: not a positive number, or more ranks than GPUs on a machine that has some.
    """
    if nproc is not None and nproc < 1:
        raise ConfigError("--nproc", nproc, "must be at least 1", "Pass the number of ranks per node.")
    asked = nproc or spec.nproc
    num_gpus = 0 if asked_device(spec, command_line) == "cpu" else count_gpus()
    if asked and num_gpus and asked > num_gpus:
        way_out = f"Pass --nproc {num_gpus} and a parallelism that fits, or --smartmoe-device cpu."
        raise ConfigError("--nproc", asked, f"there are {num_gpus} GPUs here, and each rank needs one", way_out)
    return asked or num_gpus or 1


def count_gpus() -> int:
    """GPUs that CUDA programs may use here."""
    import torch

    return torch.cuda.device_count()


def make_plan(spec: RunSpec, command_line: Sequence[str], topology: Topology, run_dir: Path) -> Plan:
    """Merge the flags, check them, and write down the command.

    Raises:
        ConfigError: anything that would stop the ranks.
    """
    from megatron_smartmoe.adapter.flags.checkpoint_check import check_load
    from megatron_smartmoe.adapter.flags.megatron_checks import megatron_verdict
    from megatron_smartmoe.adapter.flags.parser import build_parser
    from megatron_smartmoe.adapter.pretrain import check_flags, choose_device, with_defaults

    cpu = choose_device(asked_device(spec, command_line))
    corpus.check(spec)
    derived = corpus.dataset_flags(spec)
    config = {**derived, **spec.flags}
    open_tokens = flag_lists.merge(config, command_line, build_parser()._option_string_actions)
    tokens = [token.replace("{run_dir}", str(run_dir)) for token in open_tokens]
    os.environ["WORLD_SIZE"] = str(topology.world_size)
    args = check_flags(with_defaults(tokens, cpu=cpu, say=False), cpu=cpu, data_exists=corpus.exists(spec))
    check_load(args)
    if not args.use_checkpoint_args:
        megatron_verdict(args)
    return Plan(
        command=[*program(topology), *tokens, "--smartmoe-run-dir", str(run_dir)],
        environment=rank_environment(topology, cpu=cpu),
        spec=replace(spec, nproc=topology.ranks_per_node, flags=_without(derived, flag_lists.as_mapping(open_tokens))),
    )


def _without(derived: dict[str, FlagValue], flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
    """The flags but those that `data` stands for: dropping `data` later drops them too."""
    return {name: value for name, value in flags.items() if derived.get(name) != value}


def program(topology: Topology, entry: str = ENTRY) -> list[str]:
    """What starts the ranks of module `entry`: torchrun, or, where Slurm starts each of them, the module itself."""
    if topology.rank is not None:
        return [sys.executable, "-m", entry]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(topology.ranks_per_node)]
    if topology.num_nodes == 1:
        return [*torchrun, "--standalone", "--module", entry]
    where = ["--nnodes", str(topology.num_nodes), "--node-rank", str(topology.node)]
    master = ["--master-addr", topology.master_addr, "--master-port", str(topology.master_port)]
    return [*torchrun, *where, *master, "--module", entry]


def rank_environment(topology: Topology, *, cpu: bool) -> dict[str, str]:
    """Variables of the ranks; what the user has set already stays."""
    threads = max(1, (os.cpu_count() or 1) // topology.ranks_per_node) if cpu else 1
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
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
