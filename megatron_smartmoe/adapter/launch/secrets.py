"""Keys and passwords stay out of what is written: a run directory's files name a variable of the environment instead.

A value is a secret when its flag or variable is named like one (`--x-api-key`, `SLURM_JWT`), when it looks like one (a
token of a known form, an address with a password), or when a variable that is named like one has the same value. In
`config.yaml` its place has `${NAME}`, which is read from the environment when the run resumes; `command.sh` expands the
same variable. Flags are still visible in `ps`: pass secrets in the environment where a program reads them there.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import FlagValue
from megatron_smartmoe.spec.secrets import MASK, is_secret_flag, is_secret_variable

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_SHORTEST = 8  # characters: a shorter value is too likely to be equal by chance


class Masked(str):
    """The name of the variable that a secret is read from, in the place of the secret."""


def masked_flags(flags: Mapping[str, FlagValue], environ: Mapping[str, str] = os.environ) -> dict[str, FlagValue]:
    """The flags of a configuration with `${NAME}` for secrets."""
    masked: dict[str, FlagValue] = {}
    for name, value in flags.items():
        if isinstance(value, list):
            masked[name] = [_reference(_mask(f"--{name}", item, environ, at)) for at, item in enumerate(value)]
        else:
            masked[name] = value if isinstance(value, bool) else _reference(_mask(f"--{name}", value, environ))
    return masked


def revealed_flags(flags: Mapping[str, FlagValue], environ: Mapping[str, str] = os.environ) -> dict[str, FlagValue]:
    """The reverse of `masked_flags`: `${NAME}` as a value is what the environment has.

    Raises:
        ConfigError: the environment has no such variable.
    """
    revealed: dict[str, FlagValue] = {}
    for name, value in flags.items():
        if isinstance(value, list):
            revealed[name] = [_reveal(name, item, environ) for item in value]
        else:
            revealed[name] = value if isinstance(value, bool) else _reveal(name, value, environ)
    return revealed


def masked_command(
    command: Sequence[str], environment: Mapping[str, str], environ: Mapping[str, str] = os.environ
) -> str:
    """A command as text for a shell, which reads secrets from the environment."""
    return flag_lists.render(list(_masked(command, environ)), environment, quote=_quote)


def masked_words(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A command line with `${NAME}` for secrets."""
    return [_reference(word) for word in _masked(words, environ)]


def masked_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables without the values of secret ones."""
    return {name: MASK if is_secret_variable(name, value) else value for name, value in variables.items()}


def secrets_among(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The secret values of a command line."""
    pairs = list(_with_flags(words))
    return [value for flag, value, at in pairs if value and isinstance(_mask(flag, value, environ, at), Masked)]


def _masked(words: Sequence[str], environ: Mapping[str, str]) -> Iterator[str]:
    for flag, value, at in _with_flags(words):
        if value is None:
            yield flag
        else:
            yield _mask(flag, value, environ, at)


def _with_flags(words: Sequence[str]) -> Iterator[tuple[str, str | None, int]]:
    """(flag, None, 0) for each flag, (flag, value, place among its values) for each value; `--flag=value` is both."""
    flag, at = "", 0
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            at = 1 if equals else 0
            if equals and not isinstance(_mask(flag, value, os.environ), Masked):
                yield word, None, 0
                continue
            yield flag, None, 0
            if equals:
                yield flag, value, 0
        else:
            yield flag, word, at
            at += 1


def _mask(flag: str, value: str, environ: Mapping[str, str], at: int = 0) -> str:
    """The value, or the variable that has it."""
    if _REFERENCE.fullmatch(value):
        return value
    if len(value) >= _SHORTEST:
        for name, other in environ.items():
            if other == value and is_secret_variable(name):
                return Masked(name)
    if is_secret_flag(flag, value):
        name = re.sub(r"\W", "_", flag.lstrip("-")).upper()
        return Masked(f"SMARTMOE_SECRET_{name}" + (f"_{at + 1}" if at else ""))
    return value


def _reveal(name: str, value: str, environ: Mapping[str, str]) -> str:
    match = _REFERENCE.fullmatch(value)
    if match is None:
        return value
    if match[1] not in environ:
        rule = f"is read from the environment, which has no variable {match[1]}"
        raise ConfigError(f"--{name}", value, rule, f"Run export {match[1]}=... first, or pass --{name}.")
    return environ[match[1]]


def _reference(value: str) -> str:
    return f"${{{value}}}" if isinstance(value, Masked) else value


def _quote(word: str) -> str:
    if isinstance(word, Masked):
        return f'"${{{word}:?holds a secret that is not written down: export it first}}"'
    return shlex.quote(word)
