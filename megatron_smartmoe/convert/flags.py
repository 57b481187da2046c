"""Flags of a table as a command line has them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_smartmoe.convert.families.table import FlagValue


def as_flags(flags: Mapping[str, FlagValue]) -> list[str]:
    """The command line: True is a flag alone, False is left out."""
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not False:
            argv += [f"--{name}", flag_text(value)]
    return argv


def flag_text(value: FlagValue) -> str:
    """A value; a pattern of layers is one text, which Megatron reads without spaces."""
    return str(value).replace(" ", "")
