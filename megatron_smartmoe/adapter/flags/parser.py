"""Flags: Megatron's own, the project's `--smartmoe-*`, and the defaults that this machine needs.

Defaults go in front of the user's flags, so that whatever the user says wins. They are printed with their reason,
never set silently.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_smartmoe.adapter.flags.pool_arguments import add_pool_arguments
from megatron_smartmoe.adapter.flags.replica_arguments import add_replica_arguments
from megatron_smartmoe.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
HOMES = ("on", "off", "dry", "shuffle")
EXPERTS = ("grouped_mm", "transformer_engine")


def attribute(flag: str) -> str:
    """The name of a flag's value in parsed arguments: `--num-layers` -> `num_layers`."""
    return flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Default:
    """Flags that this machine or this project needs, and why."""

    flags: tuple[str, ...]
    reason: str


def add_smartmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the project's flags; passed to Megatron as `extra_args_provider`."""
    group = parser.add_argument_group("smartmoe", "expert placement for MoE training")
    group.add_argument(
        "--smartmoe-device",
        choices=DEVICES,
        default="auto",
        help="cuda: NCCL and GPU kernels. cpu: gloo, through the CPU facade. auto: cuda where there is a GPU.",
    )
    group.add_argument(
        "--smartmoe-run-dir",
        metavar="DIR",
        default=None,
        help="Where metrics.jsonl, arguments.txt and summary.json are written. Default: nowhere.",
    )
    group.add_argument(
        "--smartmoe",
        action="store_true",
        help="Build the model with this project's MoE layer: experts live in slots, and may change them.",
    )
    group.add_argument(
        "--smartmoe-experts",
        choices=EXPERTS,
        default="grouped_mm",
        help="With --smartmoe. grouped_mm: torch's grouped GEMM. transformer_engine: its grouped linear layers.",
    )
    group.add_argument(
        "--smartmoe-overlap-degree",
        metavar="D",
        default="1",
        help="With --smartmoe and expert parallelism: cut dispatch and combine into D groups of ranks; the rows of one "
        "group travel while the experts compute another's. From 1, which cuts nothing, to the number of "
        "expert-parallel ranks. auto: chosen by predicted time. Default: 1.",
    )
    group.add_argument(
        "--smartmoe-record-trace",
        metavar="FILE",
        default=None,
        help="Write the tokens per expert of every iteration, layer and source rank to this .npz file, for "
        "`smartmoe simulate` and --smartmoe-replay-trace. Works without --smartmoe too.",
    )
    group.add_argument(
        "--smartmoe-replay-trace",
        metavar="FILE",
        default=None,
        help="BENCHMARKS ONLY: ignore what the routers choose and route as this trace says. Nothing useful is learned.",
    )
    _add_homes_arguments(group)
    add_replica_arguments(group)
    add_pool_arguments(group)
    return parser


def _add_homes_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of the slow loop: which rank is an expert's home."""
    group.add_argument(
        "--smartmoe-homes",
        choices=HOMES,
        default="on",
        help="With --smartmoe and expert parallelism. on: move experts to other ranks when that pays. off: never. dry: "
        "decide and report, move nothing. shuffle: random homes at every interval, to see for yourself that moving "
        "experts changes nothing in the training.",
    )
    group.add_argument(
        "--smartmoe-homes-interval",
        type=int,
        metavar="ITERATIONS",
        default=100,
        help="Iterations between two looks at the homes.",
    )
    group.add_argument(
        "--smartmoe-homes-start",
        type=int,
        metavar="ITERATION",
        default=0,
        help="No look at the homes up to this iteration: early routing changes fast.",
    )
    group.add_argument(
        "--smartmoe-homes-stop",
        type=int,
        metavar="ITERATION",
        default=None,
        help="No look at the homes after this iteration. Default: never stop.",
    )
    group.add_argument(
        "--smartmoe-homes-margin",
        type=float,
        default=2.0,
        help="Experts move when the predicted gain over the horizon is above this many times the cost of moving.",
    )
    group.add_argument(
        "--smartmoe-homes-horizon",
        type=int,
        metavar="ITERATIONS",
        default=500,
        help="Iterations that a move is expected to pay for.",
    )
    group.add_argument(
        "--smartmoe-migration-staging-mib",
        type=int,
        metavar="MIB",
        default=1024,
        help="Memory of a rank for experts on their way, in MiB. What does not fit is moved in several steps.",
    )
    group.add_argument(
        "--smartmoe-migration-timeout-s",
        type=float,
        metavar="SECONDS",
        default=600.0,
        help="How long to wait for a rank that does not answer while experts move.",
    )
    group.add_argument(
        "--smartmoe-cluster",
        metavar="FILE",
        default=None,
        help="Prices of this machine (configs/clusters/*.yaml). Default: the shipped file for this GPU, or the CPU.",
    )


def device_from(argv: Sequence[str]) -> str:
    """The value of --smartmoe-device: it decides what is imported, so it is needed before Megatron can parse."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smartmoe-device", default="auto")
    device = str(parser.parse_known_args(list(argv))[0].smartmoe_device)
    if device not in DEVICES:
        raise ConfigError("--smartmoe-device", device, f"must be one of {', '.join(DEVICES)}", "Leave it out for auto.")
    return device


def has_transformer_engine() -> bool:
    """Whether TransformerEngine can be imported here."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """Whether apex can be imported here."""
    return importlib.util.find_spec("apex") is not None


def machine_defaults(*, cpu: bool, transformer_engine: bool, apex: bool) -> list[Default]:
    """The flags that go in front of the user's on such a machine."""
    defaults = [
        Default(
            flags=("--moe-token-dispatcher-type", "alltoall"),
            reason="tokens go only to the ranks that own their experts",
        ),
        Default(flags=("--no-one-logger",), reason="an NVIDIA-internal service"),
        Default(flags=("--logging-level", "30"), reason="20 for Megatron's INFO lines"),
    ]
    if not transformer_engine:
        defaults.append(
            Default(
                flags=("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"),
                reason="TransformerEngine is not installed",
            )
        )
    if not transformer_engine and not apex:
        defaults.append(
            Default(
                flags=("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
                reason="neither TransformerEngine nor apex is installed",
            )
        )
    if cpu:
        defaults.append(
            Default(
                flags=("--distributed-backend", "gloo", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"),
                reason="no GPU: gloo, and functions are not compiled",
            )
        )
    return defaults


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are ConfigErrors, without 900 lines of usage in front."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except KeyError:  # some of Megatron's flags look their value up in a table
            raise argparse.ArgumentError(action, f"invalid value: {arg_string!r}") from None

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise what argparse says as a ConfigError: `argument --lr: invalid float value: 'abc'`."""
        field, _, rest = message.removeprefix("argument ").partition(": ")
        match = re.fullmatch(r"(invalid [^:]*): (['\"])(.*?)\2(.*)", rest)
        value, rule = (match[3], match[1] + match[4]) if match else (None, rest or message)
        raise ConfigError(field if rest else "command line", value, rule, "--help-megatron says what the flags mean.")


def build_parser() -> argparse.ArgumentParser:
    """Megatron's own parser with the project's flags."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="pretrain_gpt_moe", allow_abbrev=False)
    return add_smartmoe_arguments(add_megatron_arguments(parser))


def help_text() -> str:
    """What --help of Megatron says. One of its help texts has a bare %, on which argparse stumbles."""
    parser = build_parser()
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return parser.format_help()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse flags with Megatron's own parser. Nothing is validated against anything else yet.

    Raises:
        ConfigError: an unknown flag (with the nearest known ones) or a value of the wrong type.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help-megatron lists the flags that exist."
        raise ConfigError("command line", unknown[0], "is not a flag of Megatron or of smartmoe", hint)
    # As in Megatron's own parse_args: validation reads these.
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank, args.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return args
