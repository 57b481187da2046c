"""Which values are keys and passwords: those must not be written down, nor printed."""

from __future__ import annotations

import re

MASK = "***"
_FLAG_NAME = re.compile(
    r"(^|-)((api|access|private|secret)-key|(api|access|auth|hf)-token|secret|password|passwd|passphrase|credentials?)$"
)
_VARIABLE_NAME = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|PRIVATE_KEY|TOKEN|SECRET|PASSWORD|PASSWD|JWT|CREDENTIALS?)(_|$)"
)
_VALUE = re.compile(
    r"\b(hf_\w{20,}|sk-[\w-]{20,}|gh[oprsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{20,}\.eyJ)"
    r"|://[^/\s:@]*:[^/\s:@]+@"
)


def is_secret_flag(name: str, value: str) -> bool:
    """Whether the value of a flag is a secret, by the flag's name (with or without dashes in front) or by its form."""
    return bool(_FLAG_NAME.search(name.lstrip("-")) or _VALUE.search(value))


def is_secret_variable(name: str, value: str = "") -> bool:
    """Whether the value of a variable of the environment is a secret, by the variable's name or by the value's form."""
    return bool(_VARIABLE_NAME.search(name.upper()) or name.startswith("SMARTMOE_SECRET_") or _VALUE.search(value))
