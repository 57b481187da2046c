"""Parsing: Megatron's flags, the project's `--smartmoe-*`, and the defaults that this machine needs.

Defaults go in front of the user's flags, so that the user's flags win. They are printed with their reason, never set
silently.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_smartmoe.adapter.flags.smartmoe_arguments import DEVICES, add_smartmoe_arguments
from megatron_smartmoe.adapter.gates.table import GATE, GATES, flag_values
from megatron_smartmoe.errors import CompatError, ConfigError


def attribute(flag: str) -> str:
    """The name of a flag's value in parsed arguments: `--num-layers` -> `num_layers`."""
    return flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Default:
    """Flags that this machine or this project needs, with the reason.

    Attributes:
        flags: in front of the user's.
        reason: what a line says about them.
        is_of_machine: whether what was asked for would not run here without them; otherwise they are this project's
            choice.
    """

    flags: tuple[str, ...]
    reason: str
    is_of_machine: bool = False


def device_from(argv: Sequence[str]) -> str:
    """The value of --smartmoe-device, which decides what is imported and so is needed before Megatron can parse."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smartmoe-device", default="auto")
    device = str(parser.parse_known_args(list(argv))[0].smartmoe_device)
    if device not in DEVICES:
        raise ConfigError("--smartmoe-device", device, f"must be one of {', '.join(DEVICES)}", "Remove it for auto.")
    return device


def gate_defaults(argv: Sequence[str]) -> list[Default]:
    """The flags of Megatron that the --smartmoe-gate among these flags stands for."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(GATE)
    name = parser.parse_known_args(list(argv))[0].smartmoe_gate
    if name not in GATES:
        return []
    tokens = [token for flag, value in flag_values(GATES[name]).items() for token in (flag, value) if token is not True]
    return [Default(flags=tuple(map(str, tokens)), reason=f"{GATE} {name}: {GATES[name].paper}", is_of_machine=True)]


def has_transformer_engine() -> bool:
    """Whether Megatron can import TransformerEngine here: a package that is there and broken is like none."""
    return import_fault("transformer_engine.pytorch.fp8") is None


def has_apex() -> bool:
    """Whether Megatron can import NVIDIA's apex with its kernels; PyPI has an unrelated package of that name."""
    needed = ("apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")
    return all(import_fault(name) is None for name in needed)


@functools.cache
def import_fault(name: str) -> str | None:
    """Why a module cannot be imported; None if it can.

    Raises:
        CompatError: it fails with another error than ImportError, from which Megatron's own imports would not recover.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    except Exception as error:  # whatever a broken package does, such as an OSError of a missing library
        package = name.partition(".")[0]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CompatError(
            f"{package} is installed and broken: importing {name} fails with {text}. Megatron stops there too: "
            f"reinstall it for this torch, or remove it (pip uninstall {package}); smartmoe doctor says more."
        ) from error
    return None


def machine_defaults(*, cpu: bool, transformer_engine: bool, apex: bool) -> list[Default]:
    """The flags that go in front of the user's on such a machine."""
    defaults = [
        Default(
            flags=("--moe-token-dispatcher-type", "alltoall"),
            reason="tokens go only to the ranks that own their experts",
        ),
        Default(flags=("--no-one-logger",), reason="an NVIDIA-internal service"),
        Default(flags=("--logging-level", "30"), reason="20 for Megatron's INFO lines"),
        Default(flags=("--eval-interval", "1000"), reason="Megatron needs a number, also with --eval-iters 0"),
    ]
    if cpu or not transformer_engine:
        defaults.append(
            Default(
                flags=("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"),
                reason="CPU ranks do not use TransformerEngine" if transformer_engine else _why_no_transformer_engine(),
                is_of_machine=True,
            )
        )
    if cpu or not (transformer_engine or apex):
        defaults.append(
            Default(
                flags=("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
                reason="CPU ranks use the kernels of neither TransformerEngine nor apex"
                if transformer_engine or apex
                else "neither TransformerEngine nor apex is installed",
                is_of_machine=True,
            )
        )
    if cpu:
        defaults.append(
            Default(
                flags=("--distributed-backend", "gloo", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"),
                reason="no GPU: gloo, and functions are not compiled",
                is_of_machine=True,
            )
        )
    return defaults


def _why_no_transformer_engine() -> str:
    """Not installed, or installed and broken, which nobody should have to find out from the speed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    fault = " ".join(str(import_fault("transformer_engine.pytorch.fp8")).split())
    return f"TransformerEngine is installed, and importing it fails: {fault[:200]}"


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigErrors, without 900 lines of usage in front."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        try:
            value: object = super()._get_value(action, arg_string)
            return value
        except KeyError:  # some of Megatron's flags look their value up in a table
            raise argparse.ArgumentError(action, f"invalid value: {arg_string!r}") from None

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message, such as `argument --lr: invalid float value: 'abc'`, as a ConfigError."""
        field, _, rest = message.removeprefix("argument ").partition(": ")
        match = re.fullmatch(r"(invalid [^:]*): (['\"])(.*?)\2(.*)", rest)
        value, rule = (match[3], match[1] + match[4]) if match else (None, rest or message)
        raise ConfigError(
            field if rest else "command line", value, rule, "See --help-megatron for the meaning of the flags."
        )


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Megatron's own parser with the project's flags; built once, since it reads Megatron's sources for help texts."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="pretrain_gpt_moe", allow_abbrev=False)
    return add_smartmoe_arguments(add_megatron_arguments(parser))


def help_text() -> str:
    """The help of all flags. One of Megatron's help texts has a bare %, which argparse cannot format."""
    parser = build_parser()
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return parser.format_help()


def _extra_value(value: str, argv: Sequence[str], parser: argparse.ArgumentParser) -> ConfigError:
    """The error of a value that no flag takes: it names the flag in front of it."""
    before = [token for token in argv[: list(argv).index(value)] if token.startswith("--")]
    if not before:
        rule = "is not a flag of Megatron or of smartmoe"
        return ConfigError("command line", value, rule, "See --help-megatron for all flags.")
    flag = before[-1]
    if getattr(parser._option_string_actions.get(flag), "nargs", None) == 0:
        name = flag.removeprefix("--")
        way_out = f"Write the flag alone; in a configuration file: {name}: true, or {name}: false to leave it out."
        return ConfigError(flag, value, "takes no value: it is a switch", way_out)
    return ConfigError(flag, value, "is one value too many", "See --help-megatron for the values that it takes.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse flags with Megatron's own parser, without checking them against each other.

    Raises:
        ConfigError: an unknown flag (with the nearest known ones) or a value of the wrong type.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        if not unknown[0].startswith("-"):
            raise _extra_value(unknown[0], argv, parser)
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See --help-megatron for all flags."
        raise ConfigError("command line", unknown[0], "is not a flag of Megatron or of smartmoe", hint)
    # As in Megatron's own parse_args: validation reads these.
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank, args.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return args
