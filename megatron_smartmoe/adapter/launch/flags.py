"""One list of flags out of a configuration file and a command line, where the command line wins."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence

from megatron_smartmoe.planner.flags import parse_tokens
from megatron_smartmoe.spec.run import FlagValue


def merge(config: Mapping[str, FlagValue], command_line: Sequence[str], known: Collection[str]) -> list[str]:
    """The configuration's flags that the command line does not set, then the command line.

    `--no-X` on the command line removes a flag `--X` of the configuration where Megatron itself has no `--no-X`.

    Args:
        config: flag without dashes -> value, from a RunSpec.
        command_line: tokens as the user gave them.
        known: every option string of Megatron's parser.
    """
    given = set(parse_tokens(command_line))
    negated = {flag for flag in given if flag.startswith("--no-") and flag not in known}
    negated = {flag for flag in negated if flag.removeprefix("--no-") in config}
    dropped = given | {"--" + flag.removeprefix("--no-") for flag in negated}
    tokens = [token for name, value in config.items() if f"--{name}" not in dropped for token in tokens_of(name, value)]
    return tokens + [token for token in command_line if token not in negated]


def tokens_of(name: str, value: FlagValue) -> list[str]:
    """A flag and its values as argparse reads them."""
    if value is True:
        return [f"--{name}"]
    return [f"--{name}", *([value] if isinstance(value, str) else value or [])]


def as_mapping(tokens: Sequence[str]) -> dict[str, FlagValue]:
    """The reverse of `tokens_of`: what a configuration file would say; the last of a repeated flag wins."""
    return {
        flag.removeprefix("--"): True if not values else values[0] if len(values) == 1 else values
        for flag, values in parse_tokens(tokens).items()
    }


def render(command: Sequence[str], environment: Mapping[str, str], quote: Callable[[str], str] = shlex.quote) -> str:
    """The command as text for a shell, one line per flag with its values."""
    words = [f"{name}={quote(value)}" for name, value in environment.items()]
    lines: list[list[str]] = [words]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines if line)
