"""What will be run: how many ranks, with which flags, and the command that starts them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_smartmoe.adapter.allocator import keep_pages_variables
from megatron_smartmoe.adapter.launch import corpus
from megatron_smartmoe.adapter.launch.machine import vocabulary
from megatron_smartmoe.adapter.launch.merged import Merged, asked_device, merge
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.adapter.rehearsal.request import Request
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec

ENTRY = "megatron_smartmoe.adapter.pretrain"
TORCHRUN = "megatron_smartmoe.adapter.launch.torchrun"


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """A checked launch.

    Attributes:
        command: the program and its arguments.
        environment: variables of the command beside those of this process.
        spec: the merged configuration, with `{run_dir}` not filled in.
        save: the folder that checkpoints go to, if there is one.
        resume_flags: flags that resuming from `save` needs beside the configuration.
        lines: what the checks have to say.
        flags: the flags of the ranks.
        request: what is to be rehearsed; None where the user wants no rehearsal.
    """

    command: list[str]
    environment: dict[str, str]
    spec: RunSpec
    save: Path | None = None
    resume_flags: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    flags: list[str] = field(default_factory=list)
    request: Request | None = None


def ranks_per_node(nproc: int | None, spec: RunSpec, command_line: Sequence[str]) -> int:
    """Ranks per node: --nproc, else the configuration's, else one per GPU, else 1.

    Raises:
        ConfigError: not a positive number, or more ranks than GPUs on a machine that has some.
    """
    if nproc is not None and nproc < 1:
        raise ConfigError("--nproc", nproc, "must be at least 1", "For example --nproc 8, the ranks per node.")
    asked = nproc or spec.nproc
    num_gpus = 0 if asked_device(spec, command_line) == "cpu" else count_gpus()
    if asked and num_gpus and asked > num_gpus:
        way_out = f"Pass --nproc {num_gpus} and a parallelism that fits, or --smartmoe-device cpu."
        raise ConfigError("--nproc", asked, f"there are {num_gpus} GPUs here, and each rank needs one", way_out)
    return asked or num_gpus or 1


def fit_to_gpus(nproc: int | None, spec: RunSpec, command_line: Sequence[str]) -> RunSpec:
    """The configuration for this node's GPUs, or for `nproc` ranks on GPUs; the same on the CPU.

    Raises:
        ConfigError: it has entries for GPUs, and none for so few.
    """
    num_gpus = 0 if asked_device(spec, command_line) == "cpu" else count_gpus()
    return spec.on_gpus(nproc if nproc and nproc >= 1 else num_gpus) if num_gpus else spec


def idle_gpus(topology: Topology, *, cpu: bool) -> tuple[str, ...]:
    """A line where this launcher starts fewer ranks than there are GPUs; none otherwise."""
    ranks, num_gpus = topology.ranks_per_node, 0 if cpu or topology.rank is not None else count_gpus()
    if ranks >= num_gpus:
        return ()
    way_out = "--nproc, else gpus or nproc of the configuration, decides"
    return (f"{ranks} of the {num_gpus} GPUs of this node {'is' if ranks == 1 else 'are'} used: {way_out}",)


def count_gpus() -> int:
    """Number of GPUs that CUDA programs can use on this host."""
    import torch

    return torch.cuda.device_count()


def make_command(spec: RunSpec, command_line: Sequence[str], topology: Topology, run_dir: Path) -> LaunchCommand:
    """Merge the flags, check them as the ranks will, and build the command that starts the ranks.

    Raises:
        ConfigError: anything that would stop the ranks.
    """
    from megatron_smartmoe.adapter.flags.checkpoint_check import check_load
    from megatron_smartmoe.adapter.flags.megatron_checks import check_args, megatron_verdict
    from megatron_smartmoe.adapter.flags.start_checks import start_lines

    merged = merge(spec, command_line, topology, run_dir)
    with merged.naming_origins():
        check_args(merged.args, cpu=merged.cpu, data_exists=corpus.exists(spec))
        lines = (*check_load(merged.args), *start_lines(merged.args), *idle_gpus(topology, cpu=merged.cpu))
        is_rehearsed = merged.args.smartmoe_rehearsal == "on"
        if not is_rehearsed and not merged.args.use_checkpoint_args:
            megatron_verdict(merged.args)
    flags = [*merged.tokens, "--smartmoe-run-dir", str(run_dir)]
    return LaunchCommand(
        command=[*program(topology), *flags],
        environment=rank_environment(topology, cpu=merged.cpu),
        spec=merged.spec,
        save=_local(getattr(merged.args, "save", None)),
        resume_flags=_resume_flags(merged.args),
        lines=lines,
        flags=flags,
        request=_request(merged, spec, topology, run_dir) if is_rehearsed else None,
    )


def _request(merged: Merged, spec: RunSpec, topology: Topology, run_dir: Path) -> Request:
    """The rehearsal of this launch; the run directory, which is another one every time, is left open."""
    from megatron_smartmoe.adapter.pretrain import device_capability, with_defaults

    exists = corpus.exists(spec)
    tokens = with_defaults(merged.tokens, cpu=merged.cpu, say=False)
    # The model of --use-checkpoint-args is in the checkpoint, which has to be found.
    open_dir = str(run_dir) if merged.args.use_checkpoint_args else "{run_dir}"
    return Request(
        defaults=tuple(tokens[: len(tokens) - len(merged.tokens)]),
        tokens=tuple(_with_run_dir(token, run_dir, open_dir) for token in merged.tokens),
        origins=merged.origins,
        world_size=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
        cpu=merged.cpu,
        capability=device_capability(cpu=merged.cpu),
        data_exists=exists,
        vocabulary=None if exists else vocabulary(spec, merged.args),
    )


def _with_run_dir(token: str, run_dir: Path, name: str) -> str:
    """A token that is the run directory, or a path in it, with `name` in its place; `--flag=PATH` is one too."""
    flag, equals, path = token.rpartition("=")
    if path != str(run_dir) and not path.startswith(f"{run_dir}/"):
        return token
    return f"{flag}{equals}{name}{path.removeprefix(str(run_dir))}"


def _local(folder: str | None) -> Path | None:
    """A folder of a file system; None for object storage, which the launcher cannot look into."""
    return None if not folder or "://" in folder else Path(folder)


def _resume_flags(args: Namespace) -> tuple[str, ...]:
    """What the configuration lacks to resume from its own checkpoints: it may load others, or none."""
    values = vars(args)
    if not values.get("save"):
        return ()
    load = () if values.get("load") == values["save"] else ("--load", values["save"])
    return (*load, "--no-finetune") if values.get("finetune") else load


def program(topology: Topology, entry: str = ENTRY) -> list[str]:
    """The command that starts the ranks of module `entry`: torchrun, or the module where Slurm starts each rank."""
    if topology.rank is not None:
        return [sys.executable, "-m", entry]
    torchrun = [sys.executable, "-m", TORCHRUN, "--nproc-per-node", str(topology.ranks_per_node)]
    if topology.num_nodes == 1:
        return [*torchrun, "--standalone", "--module", entry]
    where = ["--nnodes", str(topology.num_nodes), "--node-rank", str(topology.node)]
    master = ["--master-addr", topology.master_addr, "--master-port", str(topology.master_port)]
    return [*torchrun, *where, *master, "--module", entry]


def rank_environment(topology: Topology, *, cpu: bool) -> dict[str, str]:
    """Environment variables of the ranks; OMP_NUM_THREADS and malloc's variables stay if the user has set them."""
    threads = max(1, (os.cpu_count() or 1) // topology.ranks_per_node) if cpu else 1
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if cpu:
        environment |= keep_pages_variables(os.environ)
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
