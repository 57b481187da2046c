"""This project's flags in the parser of somebody else's training script, and the checks before it starts.

Our own entry puts the machine's defaults in front of the command line. A script reads `sys.argv` itself, so here they
become defaults of the parser: what the user passes wins all the same, and the command line stays as it was. Only what
this machine needs is set; which dispatcher to use, for example, is the script's own choice.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from megatron_smartmoe.adapter.flags.parser import gate_defaults, has_apex, has_transformer_engine, machine_defaults
from megatron_smartmoe.adapter.flags.smartmoe_checks import check_smartmoe
from megatron_smartmoe.adapter.gates.table import TOP_K
from megatron_smartmoe.adapter.repairs.bucket_padding import check_bucket_padding
from megatron_smartmoe.errors import ConfigError


def set_machine_defaults(parser: argparse.ArgumentParser, *, cpu: bool) -> list[str]:
    """Make what this machine and the gate of this command line need the defaults of Megatron's flags.

    Args:
        parser: with Megatron's flags; of those that this release lacks nothing is set.
        cpu: whether the CPU facade is in use.

    Returns:
        A line for each reason.
    """
    lines = []
    of_machine = machine_defaults(cpu=cpu, transformer_engine=has_transformer_engine(), apex=has_apex())
    for default in (*of_machine, *gate_defaults(sys.argv[1:])):
        known = list(_known(parser, default.flags)) if default.is_of_machine else []
        parser.set_defaults(**{action.dest: value for action, value, _ in known})
        if known:
            lines.append(f"default {' '.join(text for _, _, text in known)}   ({default.reason})")
    return lines


def _known(parser: argparse.ArgumentParser, flags: tuple[str, ...]) -> Iterator[tuple[argparse.Action, Any, str]]:
    """(action, value, text) of each flag that the parser has."""
    given = list(flags)
    while given:
        flag = given.pop(0)
        value = given.pop(0) if given and not given[0].startswith("--") else None
        action = parser._option_string_actions.get(flag)
        if action is not None:
            yield action, action.const if value is None else value, flag if value is None else f"{flag} {value}"


class Given(argparse.Namespace):
    """Parsed arguments with None for the flags that this release of Megatron does not have."""

    def __getattr__(self, name: str) -> None:  # called for what is not there
        if name.startswith("__"):
            raise AttributeError(name)


def check_script(args: argparse.Namespace, *, cpu: bool, subclass_gets_groups: bool) -> None:
    """Check the project's flags in a script of somebody else, before Megatron validates its own.

    Args:
        args: parsed.
        cpu: whether the CPU facade is in use.
        subclass_gets_groups: whether this Megatron builds a subclass of its MoE layer as it builds its own.

    Raises:
        ConfigError: the first rule that is broken.
    """
    given = Given(**vars(args))
    if given.yaml_cfg is not None and given.smartmoe:
        rule = "is not supported with --smartmoe: flags in Megatron's own YAML are not checked"
        raise ConfigError("--yaml-cfg", given.yaml_cfg, rule, "Use flags, or remove --smartmoe.")
    check_smartmoe(given, cpu=cpu)
    check_bucket_padding(given)
    if given.smartmoe and given.mtp_num_layers and not subclass_gets_groups:
        rule = "is not supported with --smartmoe in this Megatron, whose prediction layers know its own MoE layer only"
        raise ConfigError("--mtp-num-layers", given.mtp_num_layers, rule, "Use Megatron 0.18 or later, or remove it.")
    if cpu and ((given.tensor_model_parallel_size or 1) > 1 or (given.context_parallel_size or 1) > 1):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it; it means nothing here


def wants(args: argparse.Namespace) -> bool:
    """Whether any of the project's flags asks for something that happens while training."""
    files = (args.smartmoe_run_dir, args.smartmoe_record_trace, args.smartmoe_replay_trace)
    return bool(args.smartmoe) or args.smartmoe_gate != TOP_K or any(file is not None for file in files)
