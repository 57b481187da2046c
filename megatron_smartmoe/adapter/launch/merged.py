"""A run, read once: configuration file, command line, topology and run directory become one list of flags, parsed.

The launcher and `--parallel auto` both start from here. The parser is Megatron's own, with the defaults of this machine
in front, so the arguments are those that the ranks will see.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_smartmoe.adapter.launch import corpus
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.constraints import DECIDED, without_negated
from megatron_smartmoe.planner.flags import parse_tokens
from megatron_smartmoe.spec.run import FlagValue, RunSpec


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One run as Megatron's parser reads it.

    Attributes:
        args: parsed arguments, not yet checked against each other.
        tokens: the flags of the ranks, without this machine's defaults.
        spec: the same as a configuration file, with `{run_dir}` not filled in.
        command_line: the user's own flags among the tokens.
        known: every option string of the parser.
        cpu: whether the ranks are CPU ranks.
        origins: where each flag was set: the command line, the configuration with the key, or a plan.
    """

    args: Namespace
    tokens: list[str]
    spec: RunSpec
    command_line: list[str]
    known: Collection[str]
    cpu: bool
    origins: Mapping[str, str]

    @contextlib.contextmanager
    def naming_origins(self) -> Iterator[None]:
        """A context whose ConfigErrors say where the flag that they name was set."""
        with _naming(self.origins):
            yield


def merge(
    spec: RunSpec, command_line: Sequence[str], topology: Topology, directory: Path, *, to_plan: bool = False
) -> Merged:
    """Merge and parse; installs the CPU facade where the ranks are CPU ranks.

    Args:
        spec: the configuration file.
        command_line: the user's own flags, which win over the configuration's.
        topology: the ranks of the job.
        directory: the run directory, for `{run_dir}` in values.
        to_plan: whether the planner will decide the parallel flags: those of the configuration are left out then, and
            so are `--no-X` flags that only the planner reads.

    Raises:
        ConfigError: an unknown flag or key, or a value of the wrong type.
    """
    from megatron_smartmoe.adapter.device import choose_device, refuse_old_megatron
    from megatron_smartmoe.adapter.flags.parser import build_parser, parse
    from megatron_smartmoe.adapter.pretrain import with_defaults

    cpu = choose_device(asked_device(spec, command_line))
    refuse_old_megatron()
    os.environ["WORLD_SIZE"] = str(topology.world_size)  # Megatron's parser reads it
    known: Collection[str] = build_parser()._option_string_actions
    corpus.check(spec)
    if to_plan:
        command_line = without_negated(command_line, known)
        spec = replace(spec, flags={name: value for name, value in spec.flags.items() if f"--{name}" not in DECIDED})
    derived = corpus.dataset_flags(spec)
    origins = _origins(spec, derived, command_line)
    open_tokens = flag_lists.merge({**derived, **spec.flags}, command_line, known)
    tokens = [token.replace("{run_dir}", str(directory)) for token in open_tokens]
    # Flags that `data` stands for are not repeated in the configuration: dropping `data` later drops them too.
    flags = {name: value for name, value in flag_lists.as_mapping(open_tokens).items() if derived.get(name) != value}
    with _naming(origins):
        args = parse(with_defaults(tokens, cpu=cpu, say=False))
    return Merged(
        args=args,
        tokens=tokens,
        spec=replace(spec, nproc=topology.ranks_per_node, flags=flags),
        command_line=list(command_line),
        known=known,
        cpu=cpu,
        origins=origins,
    )


def _origins(spec: RunSpec, derived: Mapping[str, FlagValue], command_line: Sequence[str]) -> dict[str, str]:
    """Where each flag was set; the command line wins over the configuration."""
    data = spec.origins.get("data", "data of the configuration")
    found = {f"--{name}": data for name in derived}
    found |= {f"--{name}": spec.origins.get(name, "configuration") for name in spec.flags}
    return found | dict.fromkeys(parse_tokens(command_line), "command line")


@contextlib.contextmanager
def _naming(origins: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise error.set_by(next((origins[word] for word in error.field.split() if word in origins), None)) from error


def asked_device(spec: RunSpec, command_line: Sequence[str]) -> str:
    """--smartmoe-device of the command line, else of the configuration, else auto."""
    from megatron_smartmoe.adapter.flags.parser import device_from

    configured = None if "--no-smartmoe-device" in command_line else spec.flags.get("smartmoe-device")
    return device_from([*(flag_lists.tokens_of("smartmoe-device", configured) if configured else []), *command_line])
