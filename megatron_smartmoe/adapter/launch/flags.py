"""One list of flags out of a configuration file and a command line, where the command line wins."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence

from megatron_smartmoe.adapter.gates.table import GATE, GATES, all_flags
from megatron_smartmoe.planner.flags import parse_tokens
from megatron_smartmoe.spec.run import FlagValue

# Ways to say one thing, of which Megatron accepts one: a way on the command line replaces those of the configuration.
_ALTERNATIVES = (
    (("lr-warmup-iters",), ("lr-warmup-fraction",), ("lr-warmup-samples",)),
    (
        ("mock-data",),
        ("data-path",),
        ("train-data-path", "valid-data-path", "test-data-path"),
        ("data-args-path",),
        ("per-split-data-args-path",),
    ),
)


def merge(config: Mapping[str, FlagValue], command_line: Sequence[str], known: Collection[str]) -> list[str]:
    """The configuration's flags that the command line does not set, then the command line.

    `--no-X` on the command line removes a flag `--X` of the configuration where Megatron itself has no `--no-X`. So
    does another way to say the same thing: `--mock-data` on the command line removes the configuration's data-path, and
    `--smartmoe-gate` the flags of the configuration that the gate stands for.

    Args:
        config: flag without dashes -> value, from a RunSpec.
        command_line: tokens as the user gave them.
        known: every option string of Megatron's parser.
    """
    parsed = parse_tokens(command_line)
    given = set(parsed)
    negated = {flag for flag in given if flag.startswith("--no-") and flag not in known}
    negated = {flag for flag in negated if flag.removeprefix("--no-") in config}
    dropped = given | {"--" + flag.removeprefix("--no-") for flag in negated} | _replaced(given)
    dropped |= {flag for name in parsed.get(GATE, ()) if name in GATES for flag in all_flags(GATES[name])}
    tokens = [token for name, value in config.items() if f"--{name}" not in dropped for token in tokens_of(name, value)]
    return tokens + [token for token in command_line if token not in negated]


def _replaced(given: Collection[str]) -> set[str]:
    """Flags that say in another way what a flag of the command line says."""
    found: set[str] = set()
    for ways in _ALTERNATIVES:
        used = [way for way in ways if any(f"--{name}" in given for name in way)]
        if used:
            found |= {f"--{name}" for way in ways if way not in used for name in way}
    return found


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
