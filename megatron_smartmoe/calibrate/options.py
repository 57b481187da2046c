"""The options of `smartmoe calibrate`, shared by the command and the ranks that it starts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import TAKEN_NAMES

# Defaults by device: (hidden, ffn, experts), tokens per expert, bytes of a rank's buffer in a collective, bytes copied.
_SHAPE = {"cuda": (4096, 1536, 8), "cpu": (256, 512, 2)}
_TOKENS = {"cuda": (16, 64, 256, 1024, 4096), "cpu": (2, 8, 32, 128, 512)}
_SIZES = {
    "cuda": (8 << 10, 128 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20),
    "cpu": (1 << 10, 16 << 10, 128 << 10, 1 << 20, 4 << 20, 16 << 20),
}
_COPIES = {"cuda": (128 << 20, 256 << 20, 512 << 20), "cpu": (32 << 20, 64 << 20, 128 << 20)}  # beyond the caches


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to measure and where to write it; None takes the device's default.

    Attributes:
        output: the cluster file to write.
        overwrite: whether an existing file is overwritten.
        name: name of the cluster; None takes the file's name.
        nproc: ranks per node; None starts one per GPU, on a CPU one per core.
        device: auto, or cpu on a machine with GPUs.
        compare: a cluster file to compare with; None takes the shipped one for this device, if there is one.
        hidden, ffn, experts: shape of an expert, and experts of a rank.
        tokens: tokens per expert, one point each.
        sizes: bytes of a rank's buffer in a collective, one point each.
        repeats: repeats of each point.
        levels: levels of the network above the nodes, each with the nodes of one domain, such as leaf:4, the smallest
            first; None takes those of `compare`.
    """

    output: Path = Path("cluster.yaml")
    overwrite: bool = False
    name: str | None = None
    nproc: int | None = None
    device: str = "auto"
    compare: Path | None = None
    hidden: int | None = None
    ffn: int | None = None
    experts: int | None = None
    tokens: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    repeats: int = 9
    levels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> CalibrateOptions:
        """The options of a parsed command line.

        Raises:
            ConfigError: a number below 1, fewer than two amounts, or an output that exists.
        """
        found = cls(**{name: getattr(parsed, name) for name in cls.__dataclass_fields__})
        for name in ("nproc", "hidden", "ffn", "experts", "repeats"):
            value = getattr(found, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name}", value, "must be at least 1", f"For example: --{name} 8.")
        for name in ("tokens", "sizes"):
            values = getattr(found, name)
            if values is not None and len(set(values)) < 2:
                raise ConfigError(
                    f"--{name}", values, "needs at least two different amounts", f"For example: --{name} 1024,65536."
                )
        domains_of(found.levels or ())
        if found.output.exists() and not found.overwrite:
            raise ConfigError("--output", str(found.output), "exists already", "Name another file, or add --overwrite.")
        return found

    def for_device(self, kind: str) -> CalibrateOptions:
        """The options with the defaults of `cuda` or `cpu` filled in."""
        hidden, ffn, experts = _SHAPE[kind]
        return replace(
            self,
            hidden=self.hidden or hidden,
            ffn=self.ffn or ffn,
            experts=self.experts or experts,
            tokens=self.tokens or _TOKENS[kind],
            sizes=self.sizes or _SIZES[kind],
        )


def domains_of(levels: Sequence[str]) -> dict[str, int]:
    """Nodes of one domain by the name of its level, from `leaf:4`.

    Raises:
        ConfigError: not of that form, a name that is taken, or domains that are not made of whole smaller ones.
    """
    found: dict[str, int] = {}
    inner = 1
    for text in levels:
        name, _, number = text.partition(":")
        nodes = int(number) if number.isdecimal() and len(number) < 8 else 0
        if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None or name in (*found, *TAKEN_NAMES):
            rule = "must be a name of small letters and the nodes of a domain; each level has its own, none of "
            raise ConfigError("--levels", text, rule + ", ".join(TAKEN_NAMES), "For example: --levels leaf:4,spine:16.")
        if nodes <= inner or nodes % inner:
            rule = f"must be a multiple of {inner}, and more: the nodes of the domains inside it"
            raise ConfigError("--levels", text, rule, f"For example: --levels {name}:{2 * inner}.")
        found[name] = inner = nodes
    return found


def copy_sizes(kind: str) -> tuple[int, ...]:
    """Bytes to copy in the memory of `cuda` or `cpu`."""
    return _COPIES[kind]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    default = CalibrateOptions()
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=default.output,
        metavar="YAML",
        help="cluster file to write (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="overwrite an existing file")
    add("--name", help="name of the cluster (default: the file's name)")
    text = "ranks per node, which measure at the same time (default: one per GPU; without a GPU one per core)"
    add("--nproc", type=int, metavar="N", help=text)
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu measures CPU ranks on a machine with GPUs")
    text = "cluster file to compare with and to take unmeasured links from (default: the shipped file for this device)"
    add("--compare", type=Path, metavar="YAML", help=text)
    add("--hidden", type=int, metavar="H", help=f"hidden size of an expert (default: {_both(_SHAPE, 0)})")
    add("--ffn", type=int, metavar="F", help=f"intermediate size of an expert, gated (default: {_both(_SHAPE, 1)})")
    add("--experts", type=int, metavar="E", help=f"experts per rank (default: {_both(_SHAPE, 2)})")
    text = f"tokens per expert, separated by commas (default: {_list(_TOKENS, 'cuda')}; CPU: {_list(_TOKENS, 'cpu')})"
    add("--tokens", type=_amounts, metavar="LIST", help=text)
    defaults = f"default: {_list(_SIZES, 'cuda')}; CPU: {_list(_SIZES, 'cpu')}"
    text = f"bytes of a rank's buffer in a collective, separated by commas ({defaults})"
    add("--sizes", type=_amounts, metavar="LIST", help=text)
    text = "levels of the network above the nodes and the nodes of one domain, the smallest first, such as "
    text += (
        "leaf:4,spine:16; each is measured where the job has nodes in several of its domains (default: of --compare)"
    )
    add("--levels", type=_names, metavar="NAME:NODES,...", help=text)
    add(
        "--repeats", type=int, default=default.repeats, metavar="N", help="repetitions per point (default: %(default)s)"
    )


def as_argv(options: CalibrateOptions) -> list[str]:
    """The command line with these options."""
    argv: list[str] = []
    default = CalibrateOptions()
    for name in CalibrateOptions.__dataclass_fields__:
        value: Any = getattr(options, name)
        if value == getattr(default, name):
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv.append(",".join(str(each) for each in value) if isinstance(value, tuple) else str(value))
    return argv


def _both(table: Mapping[str, tuple[int, ...]], at: int) -> str:
    return f"{table['cuda'][at]}; CPU: {table['cpu'][at]}"


def _list(table: Mapping[str, tuple[int, ...]], kind: str) -> str:
    return ",".join(str(value) for value in table[kind])


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _amounts(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas; 4e6 is one."""
    try:
        values = tuple(sorted({int(float(part)) for part in text.split(",") if part.strip()}))
    except (ValueError, OverflowError):
        values = ()
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive whole numbers, such as 8,64,512")
    return values
